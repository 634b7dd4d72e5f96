"""Writes the golden files from Gemma's own tokenizer.json, with Hugging Face's library and none of our code.

    python tests/text/golden/make_golden.py FOLDER_OF_GEMMAS_TOKENIZER

`gemma_ids.json`: text and ids. `gemma_reduced_tokenizer.json`: Gemma's file with only those entries and merges that
these texts can touch: the pieces that occur in them as substrings. Ids stay Gemma's, so there are holes.
"""

import json
import sys
from pathlib import Path

import tokenizers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from awkward_texts import AWKWARD_TEXTS, LONG_SPACES  # noqa: E402

SENTENCES = {
    "pangram": "The quick brown fox jumps over the lazy dog.",
    "question": "What is the capital of France?",
    "story": "Once upon a time, in a village by the sea, there lived a fisherman who couldn't swim.",
    "numbers": "In 2024 the model had 2,614,341,888 parameters, i.e. about 2.6B.",
    "code": "import numpy as np\n\nx = np.zeros((3, 4), dtype=np.float32)\nprint(f'{x.shape=}')  # (3, 4)\n",
    "German": "Die Donaudampfschifffahrtsgesellschaft fährt übermorgen über Österreich.",
    "French": "L'été dernier, j'ai mangé des crêpes à l'œuf près de la forêt.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Korean": "모든 인간은 태어날 때부터 자유롭다.",
    "turn": "user\nWrite a haiku about autumn.",
    "system and user": "user\nYou are terse.\n\nWhy is the sky blue?",
    "Markdown": "# Title\n\n* **bold** and *italic*\n* `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
    "web address": "See https://arxiv.org/abs/2408.00118 (Gemma 2), v3.",
}


def main(folder: Path) -> None:
    path = folder / "tokenizer.json"
    gemma = tokenizers.Tokenizer.from_file(str(path))
    gemma.encode_special_tokens = True
    texts = SENTENCES | AWKWARD_TEXTS | LONG_SPACES
    # The library takes reserved pieces that Gemma's file does not call special, such as <mask>, for tokens; this
    # package does not.
    del texts["reserved tokens"]
    golden = {
        name: {"text": text, "ids": gemma.encode(text, add_special_tokens=False).ids} for name, text in texts.items()
    }
    contents = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"] for token in contents["added_tokens"]}
    normalized = [text.replace(" ", "▁") for text in texts.values()]
    longest = max(map(len, contents["model"]["vocab"]))
    substrings = {
        text[first : first + length]
        for text in normalized
        for first in range(len(text))
        for length in range(1, min(longest, len(text) - first) + 1)
    }
    model = contents["model"]
    model["vocab"] = {
        piece: index
        for piece, index in model["vocab"].items()
        if piece in added or piece in substrings or piece.startswith("<0x")
    }
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    model["merges"] = [
        " ".join(pair) for pair in pairs if pair[0] + pair[1] in model["vocab"] and {*pair} <= model["vocab"].keys()
    ]
    write(HERE / "gemma_ids.json", golden)
    write(HERE / "gemma_reduced_tokenizer.json", contents)


def write(path: Path, contents: object) -> None:
    text = json.dumps(contents, ensure_ascii=False, separators=(",", ":"))
    if path.name == "gemma_ids.json":
        text = text.replace("},", "},\n")
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
