"""The arithmetic of memory: published figures to the digit, and formulas against what the model really holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gemma2.config import PRESETS, Gemma2Config
from gemma2.errors import ConfigError
from gemma2.memory.running import ENGINE_ROWS, engine_prefill_bytes, kv_cache_bytes, logits_bytes, prefill_bytes
from gemma2.memory.training import (
    activation_bytes,
    adapter_parameters,
    adapter_training,
    full_training,
    kept_layer_bytes,
)
from gemma2.memory.weights import embedding_bytes, weight_bytes

MIB = 2**20


@pytest.mark.parametrize(("name", "total"), [("2b", 2_614_341_888), ("9b", 9_241_705_984), ("27b", 27_227_128_320)])
def test_weights_of_the_published_sizes(name: str, total: int) -> None:
    config = PRESETS[name]
    assert weight_bytes(config, "float32") == 4 * total
    assert weight_bytes(config, "bfloat16") == 2 * total
    norms = (4 * config.num_hidden_layers + 1) * config.hidden_size
    # All widths are multiples of 64, so that q8 and q4 are 8.25 and 4.25 bits a weight, norms apart.
    assert weight_bytes(config, "q8") * 8 == pytest.approx((total - norms) * 8.25 + norms * 32, abs=0)
    assert weight_bytes(config, "q4") * 8 == pytest.approx((total - norms) * 4.25 + norms * 32, abs=0)


def test_a_row_that_ends_in_part_of_a_group_pays_for_the_group() -> None:
    config = tiny_config(hidden_size=65, intermediate_size=64)
    groups = {64: 1, 65: 2, 32: 1}  # ceil(columns / 64); 32 = heads x head size
    expected = config.vocab_size * groups[65] * 34
    # q, k and v are one matrix of 64 rows, gate and up one of 128; o and down have 65 rows, in three tiles of 32.
    for rows, columns in ((64, 65), (96, 32), (128, 65), (96, 64)):
        expected += config.num_hidden_layers * rows * groups[columns] * 34
    expected += (4 * config.num_hidden_layers + 1) * 65 * 4
    assert weight_bytes(config, "q4") == expected


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 65}, {"intermediate_size": 33, "vocab_size": 130}])
@pytest.mark.parametrize("weight_format", ["q8", "q4"])
def test_quantized_weights_take_what_the_engine_packs(weight_format: str, sizes: dict[str, int]) -> None:
    kernels = pytest.importorskip("gemma2._kernels")
    from gemma2.quantization import packed_shapes

    config = tiny_config(**sizes)
    packed = 0
    for shape in packed_shapes(config).values():
        packed += kernels.matrix_bytes(weight_format, *shape) if len(shape) == 2 else 4 * shape[0]
    assert weight_bytes(config, weight_format) == packed
    plane = kernels.matrix_bytes(weight_format, config.vocab_size, config.hidden_size)
    assert weight_bytes(config, weight_format, second_plane=True) == packed + plane


@pytest.mark.parametrize("kv_format", ["float32", "bfloat16", "int8"])
def test_a_cache_takes_what_the_engine_takes(kv_format: str) -> None:
    kernels = pytest.importorskip("gemma2._kernels")
    if not hasattr(kernels, "KVCache"):
        pytest.skip("these kernels have no attention")
    config = PRESETS["2b"]
    block = kernels.KVCache.block_bytes(kv_format, config.num_key_value_heads, config.head_dim)
    planned = kv_cache_bytes(config, kernels.KV_BLOCK, kv_format=kv_format)
    assert planned == config.num_hidden_layers * block


@pytest.mark.parametrize("chunk", [1, 100, 512, 2000])
def test_prefill_takes_what_the_engine_allocates(chunk: int) -> None:
    kernels = pytest.importorskip("gemma2._kernels")
    from gemma2.cpu import model

    config = PRESETS["2b"]
    assert model.MAX_ROWS == ENGINE_ROWS
    rows = model.Buffers.allocate(config, "int8").first_rows(min(chunk, model.MAX_ROWS))
    num_bytes = 0
    for array in vars(rows).values():
        if isinstance(array, kernels.Activations):
            num_bytes += min(chunk, model.MAX_ROWS) * (array.width + array.width // kernels.GROUP * 8)
        else:
            num_bytes += array.nbytes
    assert engine_prefill_bytes(config, chunk_tokens=chunk) == num_bytes


@pytest.mark.parametrize(("name", "whole", "bounded"), [("2b", 832, 624), ("9b", 2688, 2016), ("27b", 2944, 2208)])
def test_kv_cache_of_a_whole_context(name: str, whole: int, bounded: int) -> None:
    config = PRESETS[name]
    assert kv_cache_bytes(config, 8192, bounded=False) == whole * MIB
    assert kv_cache_bytes(config, 8192) == bounded * MIB
    assert kv_cache_bytes(config, 8192, kv_format="float32") == 2 * bounded * MIB
    # int8 halves the values and adds a float32 for each vector of head_dim values.
    assert (
        kv_cache_bytes(config, 8192, kv_format="int8") == bounded * MIB // 2 * (config.head_dim + 4) // config.head_dim
    )


def test_logits_of_a_whole_context_are_what_must_never_be_built() -> None:
    assert logits_bytes(PRESETS["2b"], 8192) / 2**30 == pytest.approx(7.8125)
    assert logits_bytes(PRESETS["2b"], 1) == 1_024_000


def test_full_training_takes_sixteen_bytes_a_parameter() -> None:
    plan = full_training(PRESETS["2b"], batch_size=1, length=1024, checkpointing=True)
    assert plan.weights + plan.master_weights + plan.gradients + plan.optimizer == 16 * 2_614_341_888
    assert plan.total == 16 * 2_614_341_888 + plan.activations + plan.loss


def test_checkpointing_keeps_one_input_a_layer() -> None:
    config = PRESETS["2b"]
    longer = config.replace(num_hidden_layers=28)
    one_layer_more = (
        activation_bytes(longer, batch_size=3, length=512, checkpointing=True)
        - activation_bytes(config, batch_size=3, length=512, checkpointing=True)
    ) // 2
    assert one_layer_more == 3 * 512 * 2304 * 2
    assert activation_bytes(config, batch_size=3, length=512, checkpointing=False) > 10 * one_layer_more * 26


def test_adapters_count_rank_times_both_sides() -> None:
    config = PRESETS["2b"]
    assert adapter_parameters(config, rank=1, modules=["q_proj"]) == 26 * (2304 + 2048)
    assert adapter_parameters(config, rank=16, modules=["q_proj", "q_proj"]) == 16 * 26 * (2304 + 2048)
    # What PEFT prints for google/gemma-2-2b, r=16, on all linear maps.
    assert adapter_parameters(config, rank=16) == 20_766_720


def test_muon_has_one_moment_of_each_matrix_of_a_layer() -> None:
    import torch

    from gemma2.model.modeling import Gemma2ForCausalLM
    from gemma2.training.optimizer import make_optimizer
    from gemma2.training.settings import OptimizerSettings

    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        vocab_size=150,
    )
    model = Gemma2ForCausalLM(config)
    optimizer = make_optimizer(model, OptimizerSettings(kind="muon", learning_rate=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [part["state"].values() for part in optimizer.state_dict().values()]
    held = sum(v.nbytes for state in states for entry in state for v in entry.values() if v.ndim)
    common: dict[str, Any] = {"batch_size": 1, "length": 8, "checkpointing": False}
    assert full_training(config, muon=True, **common).optimizer == held
    assert full_training(config, **common).optimizer == 8 * config.count_parameters().total


def test_quantized_adapters_save_what_the_format_saves() -> None:
    config = PRESETS["9b"]
    common: dict[str, Any] = {"rank": 8, "batch_size": 1, "length": 512, "checkpointing": True}
    lora, qlora = adapter_training(config, **common), adapter_training(config, **common, weight_format="q4")
    unpacked = 2 * config.hidden_size * config.intermediate_size
    # bitsandbytes quantizes linear maps: the embedding stays in bf16.
    embedding = 2 * config.count_parameters().embedding - embedding_bytes(config, "q4")
    saved = weight_bytes(config, "bfloat16") - weight_bytes(config, "q4") - embedding
    assert lora.total - qlora.total == saved - unpacked
    assert lora.master_weights + lora.gradients + lora.optimizer == 16 * adapter_parameters(config, rank=8)


def test_unknown_names_raise_with_the_nearest() -> None:
    config = PRESETS["2b"]
    with pytest.raises(ConfigError, match=r"no weight format 'bfloat61'.*Did you mean 'bfloat16'\?"):
        weight_bytes(config, "bfloat61")
    with pytest.raises(ConfigError, match="no KV format 'fp8'; they are float32, bfloat16, int8"):
        kv_cache_bytes(config, 1, kv_format="fp8")
    with pytest.raises(ConfigError, match=r"no linear map 'qproj'.*Did you mean 'q_proj'\?"):
        adapter_parameters(config, rank=4, modules=["qproj"])
    with pytest.raises(ConfigError, match="rank of an adapter must be at least 1, but is 0"):
        adapter_parameters(config, rank=0)


# -- against the model ----------------------------------------------------------------------------------------------


def tiny_config(**changes: int) -> Gemma2Config:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "sliding_window": 96,
        **changes,
    }
    return Gemma2Config(**sizes, query_pre_attn_scalar=16)


SIZES = [  # each makes another part of the formulas the largest
    (64, {}),
    (700, {}),
    (64, {"hidden_size": 512}),
    (64, {"intermediate_size": 2048}),
    (64, {"head_dim": 64}),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("length", "sizes"), SIZES)
def test_activations_are_what_autograd_keeps(length: int, sizes: dict[str, int], frozen: bool) -> None:
    torch = pytest.importorskip("torch")

    config = tiny_config(**sizes)
    model = trained_model(config, frozen=frozen)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # held, so that no address is given out twice

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        # Masks, angles, indices and scalars are shared by all layers; an adapter's own width is counted apart.
        if tensor.is_floating_point() and storage.data_ptr() not in parameters and tensor.ndim >= 2:
            if tensor.shape[-1] != ADAPTER_RANK and tensor.shape != (2, 1, length, config.head_dim // 2):
                kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(torch.arange(2 * length).view(2, length) % 100)
    planned = 2 * length * config.num_hidden_layers * kept_layer_bytes(config, frozen=frozen)
    planned += 2 * length * (2 * config.hidden_size + 4)  # the last norm's input, and its 1 / rms
    # The first layer's maps need no gradient in their input where the embedding is frozen, so less is kept there.
    assert sum(kept.values()) == pytest.approx(planned, rel=0.1 if frozen else 0.001)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("length", "sizes"), SIZES)
def test_a_training_step_holds_what_is_planned(length: int, sizes: dict[str, int], frozen: bool) -> None:
    torch = pytest.importorskip("torch")

    config = tiny_config(num_hidden_layers=8, **sizes)
    model = trained_model(config, frozen=frozen)
    ids = torch.arange(2 * length).view(2, length) % 100
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    peak = peak_bytes(lambda: model.model(ids).sum().backward())
    planned = activation_bytes(config, batch_size=2, length=length, checkpointing=False, frozen=frozen)
    # At the peak there are some of the gradients.
    assert 0.8 * planned < peak < 1.15 * planned + gradients


ADAPTER_RANK = 3


def trained_model(config: Gemma2Config, *, frozen: bool) -> Any:
    """In bf16, as a whole or by adapters."""
    torch = pytest.importorskip("torch")
    from gemma2.model import Gemma2ForCausalLM

    model = Gemma2ForCausalLM(config, dtype=torch.bfloat16)
    if frozen:
        pytest.importorskip("peft")
        from gemma2.training.adapters import add_adapter
        from gemma2.training.lean_lora import use_lean_lora
        from gemma2.training.tune_settings import AdapterSettings

        add_adapter(model, AdapterSettings(r=ADAPTER_RANK), seed=0)
        use_lean_lora(model)
    return model


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most that tensors made by an action hold at a time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("chunk", "cached"), [(512, 0), (64, 900)])
@pytest.mark.parametrize("sizes", [{}, {"intermediate_size": 4096}, {"hidden_size": 1024}, {"num_attention_heads": 8}])
def test_prefill_is_what_a_forward_pass_holds_at_its_peak(chunk: int, cached: int, sizes: dict[str, int]) -> None:
    torch = pytest.importorskip("torch")
    from gemma2.model import Gemma2ForCausalLM
    from gemma2.model.kv_cache import KVCache

    config = tiny_config(sliding_window=4096, **sizes)
    model = Gemma2ForCausalLM(config, dtype=torch.bfloat16).eval()
    cache = KVCache(config)
    input_ids = torch.arange(cached + chunk)[None] % 100
    with torch.inference_mode():
        if cached:
            model.model(input_ids[:, :cached], past_key_values=cache)
        before = cache.size_bytes
        peak = peak_bytes(lambda: model.model(input_ids[:, cached:], past_key_values=cache))
    planned = prefill_bytes(config, chunk_tokens=chunk, num_keys=cached + chunk)
    assert peak - (cache.size_bytes - before) == pytest.approx(planned, rel=0.1)
