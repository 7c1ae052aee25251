"""The drawn world's words as tokens: the tokenizer of the base model and of CLIP, and the shape of their text encoders."""

import json
from collections import Counter
from pathlib import Path

from . import world

MAX_TOKENS = 32
RARE_TOKENS = ("sks", "zwx", "ohwx", "qvt")  # ordinary tokens without a meaning, free for personalisation
ADDED_TOKENS = ("<v1>", "<v2>", "<v3>", "<v4>")


def _bytes_to_unicode():
    """GPT-2's and CLIP's table from bytes to printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


def build_tokenizer(words):
    """CLIP's byte-pair encoding with one token for each word in `words` (a Counter), and bytes for everything else.

    Returns (tokenizer, its vocabulary in order, its merges).
    """
    from transformers import CLIPTokenizer

    table = _bytes_to_unicode()
    # byte order of CLIP's own vocabulary: printable characters first
    characters = [table[b] for b in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    characters += [c for c in table.values() if c not in characters]
    vocab = characters + [c + "</w>" for c in characters]
    pieces = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges = []
    while any(len(p) > 1 for p in pieces.values()):
        pairs = Counter()
        for word, piece in pieces.items():
            for pair in zip(piece, piece[1:]):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, piece in pieces.items():
            k, merged = 0, []
            while k < len(piece):
                both = tuple(piece[k : k + 2]) == best
                merged.append("".join(best) if both else piece[k])
                k += 2 if both else 1
            pieces[word] = merged
    vocab += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(vocab)) == len(vocab)
    tokenizer = CLIPTokenizer(
        vocab={token: k for k, token in enumerate(vocab)},
        merges=merges,
        model_max_length=MAX_TOKENS,
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(list(ADDED_TOKENS))
    return tokenizer, vocab, merges


def save_tokenizer(folder, tokenizer, vocab, merges):
    """Writes what `build_tokenizer` returned."""
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
    # the two files that older readers of CLIP's format look for
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def world_words():
    """Every word that a caption can contain, with a weight, and the free tokens."""
    words = Counter()
    texts = [
        *world.CLASSES,
        *world.COLOURS,
        *world.PATTERNS,
        *(text for texts in world.STYLES.values() for text in texts),
        "a photo of an image of a picture of , . with stripes and spots plain",
        "a transparent plastic bottle empty filled with liquid sits upright with a cap",
    ]
    texts += [t for phrases, alone in world.SCENES.values() for t in (*phrases, alone)]
    for text in texts:
        for word in text.replace(",", " , ").split():
            words[word] += 10
    words.update(RARE_TOKENS)
    return words


def encode(tokenizer, texts):
    """Token ids (N, MAX_TOKENS), padded and cut to that length."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def text_config(tokenizer, hidden_size, intermediate_size, num_hidden_layers):
    """A `CLIPTextConfig` for the ids of `tokenizer`."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        projection_dim=160,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
