"""The command line: `main` finds the verb, and each verb is one module with `add_arguments` and `run`."""
