"""placeholder until merged"""
def checkpoint_layers(model):
    raise AssertionError
