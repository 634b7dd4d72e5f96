"""What the loss of distillation takes beside the models and their activations, at 256,000 words.

    python benchmarks/distillation_memory.py --length 2048

Teacher and student have the 2B's width, heads and vocabulary and few layers, for the loss does not know how many there
are. Two processes make the same step: one with the divergence over all words, one with a loss that reads the hidden
states alone. The peaks of their memory (ru_maxrss) differ by what the divergence takes. All logits of one model at once
would take 2048 x 256,000 x 4 bytes, 2.1 GB.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys


def run_step(kind: str, length: int, num_layers: int, is_full: bool) -> None:
    """Two steps in this process; prints the peak in bytes."""
    import torch
    from torch import Tensor

    from gemma2.config import preset
    from gemma2.model.modeling import Gemma2ForCausalLM
    from gemma2.training.adapters import add_adapter
    from gemma2.training.distillation import Divergence, distillation_objective, torch_teacher
    from gemma2.training.objectives import Batch, last_hidden_states
    from gemma2.training.tune_settings import AdapterSettings

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = preset("2b").replace(num_hidden_layers=num_layers)
    bf16 = torch.bfloat16
    teacher_model = Gemma2ForCausalLM(config, dtype=bf16).requires_grad_(False)
    student = Gemma2ForCausalLM(config, dtype=torch.float32 if is_full else bf16)
    if not is_full:
        add_adapter(student, AdapterSettings(), seed=0)
    teacher = torch_teacher(teacher_model, compute_dtype=bf16)

    def hidden_states_only(model: Gemma2ForCausalLM, batch: Batch) -> Tensor:
        teacher(batch)  # its hidden states; logits are formed when they are asked for
        if is_full:
            embedding = model.model.embed_tokens.weight.to(bf16)  # what the products read is part of the model
        loss = last_hidden_states(model, batch, bf16).float().square().sum()
        if is_full:
            loss = loss + 0.0 * embedding[0, 0].float()
        return loss

    objective = hidden_states_only
    if kind == "divergence":
        objective = distillation_objective(
            teacher=teacher, divergence=Divergence(kind="forward_kl"), compute_dtype=bf16
        )
    ids = torch.randint(1000, 200_000, (1, length))
    batch = Batch(
        input_ids=ids,
        labels=torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1),
        position_ids=torch.arange(length)[None],
        segment_ids=torch.ones_like(ids),
    )
    for _ in range(2):
        (objective(student, batch) / length).backward()  # type: ignore[no-untyped-call]
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--layers", type=int, default=2, help="of each model (default: 2)")
    parser.add_argument("--full", action="store_true", help="train every weight of the student, and not an adapter")
    parser.add_argument("--one", choices=("divergence", "hidden"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_step(arguments.one, arguments.length, arguments.layers, arguments.full)
        return
    peaks = {}
    for kind in ("hidden", "divergence"):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
        peaks[kind] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    loss = peaks["divergence"] - peaks["hidden"]
    print(
        f"1 x {arguments.length} tokens, 256,000 words, {'every weight' if arguments.full else 'an adapter'} trained: "
        f"peak {peaks['divergence'] / 1e9:.2f} GB, {loss / 1e9:.2f} GB of it the loss"
    )


if __name__ == "__main__":
    main()
