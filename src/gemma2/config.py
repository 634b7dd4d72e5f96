"""The architecture as data: every number that makes one Gemma 2 differ from another.

`Gemma2Config` is frozen and validated when it is made. The three published sizes are literals in `PRESETS`. Variants
(multi-head instead of grouped queries, a wide model instead of a deep one, other windows, no caps) are settings of
this class and not other code.

Sources: the report is "Gemma 2: Improving Open Language Models at a Practical Size" (arXiv 2408.00118), section 2 and
tables 1 and 2; field names are those of Hugging Face's `Gemma2Config`, whose `config.json` is read and written here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemma2.errors import ConfigError, nearest_name

SLIDING: Final = "sliding_attention"
FULL: Final = "full_attention"
LAYER_TYPES: Final = (SLIDING, FULL)
ACTIVATIONS: Final = ("gelu_pytorch_tanh",)
MAX_LAYERS: Final = 10_000
"""Many times the deepest model there is. A file that asks for more is damaged; listing its tensors takes all memory."""
MAX_SIZE: Final = 2**31 - 1
"""Of a width, a vocabulary or a length: what an int32, and so a token id or a position, can count."""
FLOAT32_RANGE: Final = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
"""The smallest and the largest number that float32 holds with all its digits."""
_FLOATS: Final = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rms_norm_eps",
    "rope_theta",
    "initializer_range",
)


def alternating_layer_types(num_hidden_layers: int) -> tuple[str, ...]:
    """Gemma 2's pattern: layer 0 is local, layer 1 global, and so on (report, section 2; HF `layer_types`)."""
    return tuple(FULL if index % 2 else SLIDING for index in range(num_hidden_layers))


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many parameters a model has; the report's table 2 counts the embedding apart from the rest."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        """All parameters. The head is the embedding, so it is counted once."""
        return self.embedding + self.non_embedding


@dataclass(frozen=True, kw_only=True)
class Gemma2Config:
    """One Gemma 2 architecture.

    Fields that differ by size have no default: a default there is a silent wrong size. Fields that all published
    sizes share default to the shared value (report, table 1; Hugging Face `configuration_gemma2.py`).

    Raises:
        ConfigError: a value is out of range, or two values do not fit each other.
    """

    hidden_size: int
    intermediate_size: int
    """Width of each of the two MLP inputs. The report prints the sum of both, twice this."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    """Scores are divided by the square root of this. 256 for 2B and 9B, 144 (= width / heads) for 27B."""

    vocab_size: int = 256_000
    max_position_embeddings: int = 8192
    sliding_window: int = 4096
    """Tokens that a local layer sees, the querying token itself included."""
    layer_types: tuple[str, ...] = ()
    """One of "sliding_attention" and "full_attention" for each layer. Left out: alternating, layer 0 local."""
    attn_logit_softcapping: float | None = 50.0
    """cap · tanh(score / cap), before the mask; None switches it off."""
    final_logit_softcapping: float | None = 30.0
    """cap · tanh(logit / cap) on the output; None switches it off."""
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    hidden_activation: str = "gelu_pytorch_tanh"
    initializer_range: float = 0.02
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    def __post_init__(self) -> None:
        num_layers = self.num_hidden_layers
        if self.layer_types in ((), []) and isinstance(num_layers, int) and num_layers <= MAX_LAYERS:
            object.__setattr__(self, "layer_types", alternating_layer_types(num_layers))
        if not isinstance(self.layer_types, list | tuple):
            raise ConfigError(f"layer_types must be a list with one name for each layer, but is {self.layer_types!r}")
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        self._validate()

    def _validate(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
            "sliding_window",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, but is {value!r}")
            largest = MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            if value > largest:
                shown = value if value < 10**20 else "far more"
                raise ConfigError(f"{name} must be at most {largest}, more than any model has, but is {shown}")
        for name in ("query_pre_attn_scalar", "rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not _is_positive_number(value):
                raise ConfigError(f"{name} must be a number above 0, but is {value!r}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            value = getattr(self, name)
            if value is not None and not _is_positive_number(value):
                raise ConfigError(f"{name} must be a number above 0, or null for no cap, but is {value!r}")
        for name in ("query_pre_attn_scalar", *_FLOATS):
            value = getattr(self, name)
            if value is not None and not FLOAT32_RANGE[0] <= value <= FLOAT32_RANGE[1]:
                raise ConfigError(
                    f"{name} must be a number that float32 holds, from {FLOAT32_RANGE[0]:.2g} to "
                    f"{FLOAT32_RANGE[1]:.2g}, but is {value:.3g}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads must be a multiple of num_key_value_heads, so that each key is shared by "
                f"equally many queries, but they are {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, since RoPE turns pairs of channels, but is {self.head_dim}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types must name each of the {self.num_hidden_layers} layers, but names {len(self.layer_types)}"
            )
        for index, layer_type in enumerate(self.layer_types):
            if layer_type not in LAYER_TYPES:
                raise ConfigError(
                    f"layer_types[{index}] must be one of {', '.join(LAYER_TYPES)}, but is {layer_type!r}."
                    + nearest_name(str(layer_type), LAYER_TYPES)
                )
        if self.hidden_activation not in ACTIVATIONS:
            raise ConfigError(
                f"hidden_activation must be one of {', '.join(ACTIVATIONS)}, but is {self.hidden_activation!r}"
            )
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < self.vocab_size:
                raise ConfigError(
                    f"{name} must be a token id from 0 to {self.vocab_size - 1} (vocab_size - 1), but is {value!r}"
                )

    def is_local(self, layer_index: int) -> bool:
        """Whether layer `layer_index` (from 0) sees only the last `sliding_window` tokens."""
        return self.layer_types[layer_index] == SLIDING

    @property
    def query_scale(self) -> float:
        """What queries are multiplied with: query_pre_attn_scalar ** -0.5."""
        scale: float = float(self.query_pre_attn_scalar) ** -0.5
        return scale

    @property
    def num_queries_per_kv(self) -> int:
        """How many query heads share one key/value head; 1 is multi-head attention."""
        return self.num_attention_heads // self.num_key_value_heads

    def count_parameters(self, vocab_size: int | None = None) -> ParameterCount:
        """Counts the parameters, the tied head once.

        Args:
            vocab_size: rows of the embedding, if other than this config's. The report's table 2 counts 256128.
        """
        rows = self.vocab_size if vocab_size is None else vocab_size
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 4 * self.hidden_size
        return ParameterCount(
            embedding=rows * self.hidden_size,
            non_embedding=self.num_hidden_layers * (attention + mlp + norms) + self.hidden_size,
        )

    def kv_cache_bytes(self, num_tokens: int, *, bytes_per_value: int = 2, bounded: bool = True) -> int:
        """Size of the KV cache of one sequence of `num_tokens` tokens, in bytes.

        Args:
            num_tokens: length of the sequence.
            bytes_per_value: 2 for bf16.
            bounded: whether local layers keep only the last `sliding_window` tokens.
        """
        per_token = 2 * self.num_key_value_heads * self.head_dim * bytes_per_value
        tokens = 0
        for layer_index in range(self.num_hidden_layers):
            local = bounded and self.is_local(layer_index)
            tokens += min(num_tokens, self.sliding_window) if local else num_tokens
        return tokens * per_token

    def replace(self, **changes: Any) -> Gemma2Config:
        """Returns a copy with some fields changed; validated like any other.

        A change of `num_hidden_layers` without `layer_types` makes the layers alternate again.
        """
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            name = sorted(unknown)[0]
            known = [field.name for field in dataclasses.fields(self)]
            raise ConfigError(f"Gemma2Config has no field {name!r}.{nearest_name(name, known)}")
        if "num_hidden_layers" in changes and "layer_types" not in changes:
            changes["layer_types"] = ()
        return dataclasses.replace(self, **changes)

    # -- Hugging Face's config.json -----------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "config.json") -> Gemma2Config:
        """Builds the config from the contents of a Hugging Face `config.json`.

        Keys that say nothing of the architecture (`transformers_version`, …) are passed over. A key that does, but
        that this model cannot express (biases, an untied head, RoPE scaling, another model_type), is refused.

        Args:
            values: the parsed JSON object.
            source: what to call the file in errors.

        Raises:
            ConfigError: a needed key is missing or its value is refused.
        """
        model_type = values.get("model_type", "gemma2")
        if model_type != "gemma2":
            raise ConfigError(f"{source}: model_type must be 'gemma2', but is {model_type!r}")
        _refuse_unsupported(values, source)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in values:
                fields[field.name] = values[field.name]
            elif field.default is dataclasses.MISSING:
                raise ConfigError(
                    f"{source}: the key {field.name!r} is missing; it has no default, as it differs by size"
                )
        # transformers 4 wrote rope_theta at the top, transformers 5 inside rope_parameters.
        rope = values.get("rope_parameters")
        if isinstance(rope, Mapping) and "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
        if fields.get("hidden_activation", "") is None:
            del fields["hidden_activation"]
        # Early published files carry only hidden_act "gelu"; the weights were trained with the tanh form
        # (Hugging Face's config falls back to gelu_pytorch_tanh for the same reason).
        hidden_act = values.get("hidden_act")
        if "hidden_activation" not in fields and hidden_act not in (None, "gelu", "gelu_pytorch_tanh"):
            raise ConfigError(f"{source}: hidden_act must be gelu_pytorch_tanh, but is {hidden_act!r}")
        if isinstance(fields.get("eos_token_id"), list):
            # Instruction-tuned folders list every stop token; the first is <eos>, the others come back at generation.
            eos = fields["eos_token_id"]
            if not eos:
                raise ConfigError(f"{source}: eos_token_id is an empty list; it needs at least one token id")
            fields["eos_token_id"] = eos[0]
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            if fields.get(name, 0) is None:
                del fields[name]
        if fields.get("layer_types", ()) is None:
            del fields["layer_types"]
        try:
            return cls(**fields)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_json_file(cls, path: str | Path) -> Gemma2Config:
        """Reads a Hugging Face `config.json`.

        Args:
            path: the file, or a folder that holds `config.json`.

        Raises:
            ConfigError: the file is missing, is not JSON, or describes something that is not a Gemma 2.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; a model folder needs its config.json") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
            raise ConfigError(f"{path}: is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: must hold one JSON object, but holds a {type(values).__name__}")
        return cls.from_dict(values, source=str(path))

    def to_dict(self, *, dtype: str | None = None) -> dict[str, Any]:
        """Returns what `config.json` holds; transformers 4 and 5, vLLM and llama.cpp's converter read it.

        Args:
            dtype: "float32" or "bfloat16" to record the stored dtype, or None to leave it out.
        """
        values = dataclasses.asdict(self)
        values["layer_types"] = list(self.layer_types)
        # transformers 5 checks types: a whole number for this one, floats for the others.
        if float(self.query_pre_attn_scalar).is_integer():
            values["query_pre_attn_scalar"] = int(self.query_pre_attn_scalar)
        for name in _FLOATS:
            if values[name] is not None:
                values[name] = float(values[name])
        values.update(
            architectures=["Gemma2ForCausalLM"],
            model_type="gemma2",
            attention_bias=False,
            attention_dropout=0.0,
            tie_word_embeddings=True,
            use_cache=True,
            hidden_act=self.hidden_activation,
        )
        if dtype is not None:
            values["torch_dtype"] = dtype
        return dict(sorted(values.items()))

    def to_json_file(self, path: str | Path, *, dtype: str | None = None) -> None:
        """Writes `config.json` (see `to_dict`) to the file `path`, through a file beside it."""
        path = Path(path)
        beside = path.with_name(path.name + ".partial")
        beside.write_text(json.dumps(self.to_dict(dtype=dtype), indent=2) + "\n", encoding="utf-8")
        beside.replace(path)


def _is_positive_number(value: object) -> bool:
    # Compared with a bound and not passed to math.isfinite, which fails for whole numbers that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _refuse_unsupported(values: Mapping[str, Any], source: str) -> None:
    """Refuses keys by which a config.json asks for something that Gemma 2 does not have."""
    if values.get("attention_bias"):
        raise ConfigError(f"{source}: attention_bias is true, but Gemma 2 has no biases")
    if values.get("tie_word_embeddings", True) is False:
        raise ConfigError(f"{source}: tie_word_embeddings is false, but Gemma 2's head is its embedding")
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{source}: {key} must be an object or null, but is {rope!r}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(f"{source}: {key} asks for scaled RoPE, but Gemma 2 uses RoPE unscaled")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{source}: {key} turns a part of each head, but Gemma 2's RoPE turns all of it")
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise ConfigError(f"{source}: {key} differs by layer type, but Gemma 2 has one RoPE for all layers")
    if values.get("use_bidirectional_attention"):
        raise ConfigError(f"{source}: use_bidirectional_attention is true, but Gemma 2's attention is causal")


PRESETS: Final[Mapping[str, Gemma2Config]] = {
    # Report, table 1; google/gemma-2-2b/config.json; gemma_pytorch get_config_for_2b_v2.
    "2b": Gemma2Config(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
    # Report, table 1; google/gemma-2-9b/config.json; gemma_pytorch get_config_for_9b. The scalar is the head size,
    # 256, and not width / heads = 224, which early configurations carried.
    "9b": Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        query_pre_attn_scalar=256,
    ),
    # Report, table 1; google/gemma-2-27b/config.json; gemma_pytorch get_config_for_27b. The only size whose scalar
    # (144 = 4608 / 32) is not its head size (128).
    "27b": Gemma2Config(
        hidden_size=4608,
        intermediate_size=36864,
        num_hidden_layers=46,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
}


def preset(name: str) -> Gemma2Config:
    """Returns the preset of exactly this name: "2b", "9b" or "27b".

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"no preset is called {name!r}; the presets are {', '.join(PRESETS)}.{nearest_name(name, PRESETS)}"
        )
    return PRESETS[name]
