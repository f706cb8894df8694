# ruff: noqa: RUF001 - ambiguous letters are what these texts are about.
"""Texts that tokenizers get wrong, and the prompts of the parity runs."""

TEXTS = (
    "Hello, world!",
    "hello world",
    "  leading spaces",
    "trailing spaces   ",
    "a  b   c    d",
    " ",
    "\n",
    "\t\ttabs\tand\nnewlines\r\n",
    "line one\n\nline three\n",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said we'll see it's John's, don't you'd",
    "I'M SURE IT'S UPPERCASE'LL",
    "1234567890",
    "3.14159 + 2,718.28 = -5.86e-3",
    "7+5=12; 007; 1st 2nd",
    "x1y2z3",
    "٣٤٥ ½ ² Ⅷ",
    "café naïve résumé Zürich São Paulo",
    "cafe\u0301 decomposed",
    "Grüße aus Köln, ÄÖÜ ß",
    "Привет, мир! Как дела?",
    "こんにちは世界。今日は良い天気です。",
    "你好，世界！",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂🚀🏳️‍🌈👩‍👩‍👧‍👦 emoji",
    "def f(x):\n    return x ** 2  # square\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2.5, null], "nested": {"a": "b\\n"}}',
    "<html><body class='x'>&amp;</body></html>",
    "https://example.org/path?query=1&other=two#part",
    "user@example.com C:\\Users\\name /usr/local/bin",
    "a\u00a0b\u2003c\u200bd",
    "…“quotes” ‘single’ – — •",
    "snake_case camelCase kebab-case SCREAMING_CASE",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>more <|im_end|> end",
    "<|im_start |> not special <repo_name>x",
    "\\frac{1}{2} \\sum_{i=1}^{n} x_i^2",
    "ªº°µ×÷",
    "\x00\x01\x7f control",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...,,,;;;---___",
)

CHATS = (
    [{"role": "user", "content": "What is 7 + 5?"}],
    [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "  Name a fruit.\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Count to 3."},
    ],
)

PROMPTS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    "The capital of France is Paris.<|im_end|>\n",
    "3 + 4 = 7\n12 + 9 = 21\n25 + 18 = 43\n30 + 7 =",
    "La café était fermé; 東京の天気は晴れです。 def add(a, b):\n    return a + b\n",
)
"""What the logits of SmolLM2 are compared on: a chat, arithmetic, and mixed scripts with code."""

SENTENCES = (
    *(text for text in TEXTS if "\0" not in text),
    "",
    "@airline worst flight ever!!! 4 hours late & nobody cares :( #fail",
    "Thank you, the crew was wonderful.",
    "the same words again and again " * 60,
)
"""What the vectors of the sentence encoder are compared on; the last one is longer than the encoder takes."""
