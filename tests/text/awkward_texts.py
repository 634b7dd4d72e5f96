"""Texts on which tokenizers go wrong, each for its own reason; and one to train a small tokenizer on."""

AWKWARD_TEXTS: dict[str, str] = {
    "empty": "",
    "one space": " ",
    "leading spaces": "   three before",
    "trailing spaces": "three after   ",
    "indentation": "def f(x):\n    if x:\n        return [x, {'a': 1}]\n\n\n# end\n",
    "tabs": "\tone\t\ttwo\t\t\tthree" + "\t" * 40,
    "newlines": "a\n\nb\n\n\nc\n\n\n\nd" + "\n" * 40,
    "windows newlines": "a\r\nb\r\n\r\nc\r\n\r\n\r\nd",
    "lone carriage returns": "a\rb\r\rc\n\rd",
    "spaces between newlines": " \n \n  \n",
    "NUL": "a\x00b\x00",
    "control characters": "\x01\x02\x1b[0m\x7f\x85",
    "Unicode spaces": "a\u00a0b\u2003c\u3000d\u200be",
    "line and paragraph separators": "a\u2028b\u2029c\x0bd\x0ce",
    "byte order mark": "\ufefftext",
    "U+2581 itself": "▁",
    "family emoji": "👩‍👩‍👧‍👦 and 👍🏽 and 🇪🇸",
    "combining accents": "e\u0301 is not é, nor is n\u0303 ñ",
    "Spanish": "¿Qué tal, señor Núñez? ¡Mañana será otro día!",
    "Chinese": "你好，世界。今天天气很好。",
    "Japanese": "吾輩は猫である。名前はまだ無い。",
    "Arabic": "مرحبا بالعالم، كيف حالك؟",
    "Hindi": "नमस्ते दुनिया",
    "Thai": "สวัสดีชาวโลก",
    "rare scripts": "ዐᎀ𐍈𓀀ꙮ",
    "unassigned and private": "\U000e0001\ue000\uffff\U0010ffff",
    "replacement character": "a\ufffdb",
    "digits": "3.14159, 1234567890 and ²³½٣",
    "HTML": "<table><tr><td>1</td></tr></table><h1>x</h1><b>y</b><div>",
    "piece of a byte": "<0x41><0x0A><0xFF>",
    "control tokens": "<bos>hi<eos><pad><unk><start_of_turn>user\nx<end_of_turn>\n",
    "reserved tokens": "<mask><2mass>[@BOS@]<unused0><unused98><unused99>[toxicity=0]",
    "JSON": '{"a": [1, 2.5e-3, null], "b": "\\u00e9\\n"}',
    "very long word": "a" * 700 + "Ab" * 300,
    "rules": "-" * 77 + "=" * 33 + "." * 19 + "_-_-_-_",
    "the unknown sign": "⁇ \u2047",
}

LONG_SPACES: dict[str, str] = {
    f"{count} spaces": text
    for count in (2, 15, 16, 17, 30, 31, 32, 33, 47, 62, 63, 100)
    for text in (" " * count + "x" + " " * count + "\n" + " " * count,)
}

TRAINING_TEXT = """The north wind and the sun were disputing which was the stronger, when a traveller came along
wrapped in a warm cloak. They agreed that the one who first succeeded in making the traveller take his cloak off
should be considered stronger than the other.\r\nThen the north wind blew as hard as he could, but the more he blew
the more closely did the traveller fold his cloak around him; and at last the north wind gave up the attempt.

Then the sun shone out warmly, and immediately the traveller took off his cloak. And so the north wind was obliged
to confess that the sun was the stronger of the two. ¿Qué será, señor? Año 1984, 27 leguas. 你好，世界。你好！
    for row in range(10):\n        print(row, {"row": row})\n ------------ aaaaaaaaaaaaaaaa abababababab ============
"""
