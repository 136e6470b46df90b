"""From the vocabulary in a GGUF's metadata to the files of a model folder.

A byte-level BPE vocabulary ("gpt2") becomes a tokenizer.json, a SentencePiece one ("llama") a tokenizer.model
(sentencepiece_proto.py); both with a tokenizer_config.json that names the special tokens and holds the chat template.
GGUF names the rule that cuts a text into words (`tokenizer.ggml.pre`) but does not carry it: a name that is not in the
table of byte_level_bpe.py is an error, because a nearly right rule gives wrong ids silently. The metadata is untrusted:
everything is checked, nothing is run. Other kinds of vocabulary (WordPiece, Unigram) are errors.
"""

from __future__ import annotations

from typing import Any

from pyllama.common.errors import ModelFormatError
from pyllama.common.model_folder import NO_TOKEN
from pyllama.common.reader import shown

from .byte_level_bpe import PRE_TOKENIZERS, PreTokenizer, to_json, tokenizer_json
from .sentencepiece_proto import Piece, model_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>")

MAX_TOKENS = 4_000_000
MAX_MERGES = 8_000_000
MAX_TOKEN_CHARS = 65_536
MAX_TEMPLATE_CHARS = 1 << 20


def tokenizer_files(metadata: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer files of a model folder, name → bytes, from a GGUF's metadata (arrays as lists).

    Raises ModelFormatError when the vocabulary is missing, inconsistent, or of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _bpe_files(metadata)
    if kind == "llama":
        return _sentencepiece_files(metadata)
    if kind is None:
        raise ModelFormatError(
            "tokenizer.ggml.model is missing: the file has no vocabulary; convert the model with its tokenizer"
        )
    raise ModelFormatError(
        f"tokenizer.ggml.model is {shown(kind)}, expected gpt2 (byte-level BPE) or llama (SentencePiece)"
    )


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids that end a text: end of sequence, of turn and of message, as far as the file names them. Raises
    ModelFormatError."""
    n_tokens = len(_tokens(metadata))
    ids = [_token_id(metadata, name, n_tokens) for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in ids if i is not None))


def end_of_turn_ids(metadata: dict[str, Any], n_tokens: int) -> list[int]:
    """Control tokens below `n_tokens` that by their names end a turn: files tend to name one end of several."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    pairs = zip(tokens[:n_tokens], types, strict=False)
    return [i for i, (token, kind) in enumerate(pairs) if kind == CONTROL and token in END_OF_TURN]


def _bpe_files(metadata: dict[str, Any]) -> dict[str, bytes]:
    tokens = _tokens(metadata)
    vocab = _unique(tokens)
    rule = _pre_tokenizer(metadata)
    types = _types(metadata, len(tokens))
    for index in end_token_ids(metadata) + [i for i in [_token_id(metadata, "bos", len(tokens))] if i is not None]:
        types[index] = CONTROL
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token_type != USER_DEFINED,
        }
        for index, token_type in enumerate(types)
        if token_type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    config = _config(metadata, tokens, rule.add_bos) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    document = tokenizer_json(
        rule,
        vocab=vocab,
        merges=_merges(metadata, vocab),
        added_tokens=added,
        post_processor=_post_processor(config, vocab),
    )
    return {"tokenizer.json": document, "tokenizer_config.json": to_json(config)}


def _sentencepiece_files(metadata: dict[str, Any]) -> dict[str, bytes]:
    tokens = _tokens(metadata)
    _unique(tokens)
    types = _types(metadata, len(tokens), required=True)
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        found = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise ModelFormatError(f"tokenizer.ggml.scores: expected {len(tokens)} numbers, one per token, found {found}")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) < 3e38:
            raise ModelFormatError(
                f"tokenizer.ggml.scores[{index}]: expected a number of 32 bits, found {shown(score)}"
            )
    if metadata.get("tokenizer.ggml.precompiled_charsmap"):
        # Native code would follow a table that anybody may have forged, and no Llama-like model has one.
        raise ModelFormatError(
            "tokenizer.ggml.precompiled_charsmap: the vocabulary has its own normalization table, "
            "which is not supported"
        )
    _check_sentencepiece(metadata, tokens, types)
    # Text reaches sentencepiece's matching with blanks already written as U+2581, so a piece with real spaces would
    # never match.
    pieces = [
        Piece(token.replace(" ", "\u2581") if token_type == USER_DEFINED else token, float(score), token_type)
        for token, score, token_type in zip(tokens, scores, types, strict=True)
    ]
    proto = model_bytes(
        pieces,
        byte_fallback=BYTE in types,
        add_dummy_prefix=_flag(metadata, "add_space_prefix", True),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", False),
    )
    config = _config(metadata, tokens, default_add_bos=True)
    # GGUF's rule, and Meta's: the text after a control token gets sentencepiece's leading blank as the first one does.
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    if metadata.get("general.architecture") == "phi3":
        config["added_tokens_decoder"] = _phi3_tokens(tokens, types)
    return {"tokenizer.model": proto, "tokenizer_config.json": to_json(config)}


def _phi3_tokens(tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Phi-3's control tokens take the line end behind them, which GGUF has no word for; three of them do not."""
    plain = ("<unk>", "<s>", "<|endoftext|>")
    return {
        str(index): {"content": token, "special": True, "rstrip": True}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL and token not in plain
    }


def _check_sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> None:
    """The invariants without which sentencepiece refuses a model; one unknown token is marked if the file only names
    it."""
    unknown = [index for index, token_type in enumerate(types) if token_type == UNKNOWN]
    if not unknown:
        index = _token_id(metadata, "unknown", len(tokens))
        if index is None:
            raise ModelFormatError(
                "tokenizer.ggml.token_type: no token is marked as unknown (2), and sentencepiece needs one"
            )
        types[index] = UNKNOWN
    elif len(unknown) > 1:
        raise ModelFormatError(
            f"tokenizer.ggml.token_type: {len(unknown)} tokens are marked as unknown (2), expected one"
        )
    n_bytes = types.count(BYTE)
    if n_bytes not in (0, 256):
        raise ModelFormatError(f"tokenizer.ggml.token_type: {n_bytes} byte tokens (6), expected 256 or none")
    expected = {f"<0x{byte:02X}>" for byte in range(256)} if n_bytes else set()
    found = {token for token, token_type in zip(tokens, types, strict=True) if token_type == BYTE}
    if found != expected:
        raise ModelFormatError(
            f"tokenizer.ggml.tokens: {shown(min(found ^ expected))} is missing or no byte token; "
            "expected <0x00> to <0xFF>"
        )


def _pre_tokenizer(metadata: dict[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise ModelFormatError(
            "tokenizer.ggml.pre is missing: files of old converters do not say how words are cut, and a guess would "
            "give wrong token ids; convert the model again with a current converter"
        )
    rule = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if rule is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise ModelFormatError(
            f"tokenizer.ggml.pre is {shown(name)}, a rule for cutting words that is not known here; known are {known}"
        )
    return rule


def _tokens(metadata: dict[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelFormatError(f"tokenizer.ggml.tokens: expected a list of strings, found {shown(tokens)}")
    if len(tokens) > MAX_TOKENS:
        raise ModelFormatError(f"tokenizer.ggml.tokens: {len(tokens)} tokens, at most {MAX_TOKENS} are allowed")
    for index, token in enumerate(tokens):
        if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_CHARS:
            raise ModelFormatError(
                f"tokenizer.ggml.tokens[{index}]: expected a string of 1 to {MAX_TOKEN_CHARS} characters, "
                f"found {shown(token)}"
            )
        if not token.isascii() and any("\ud800" <= c <= "\udfff" for c in token):
            raise ModelFormatError(f"tokenizer.ggml.tokens[{index}]: not valid UTF-8: {shown(token)}")
    return tokens


def _unique(tokens: list[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        first = vocab.setdefault(token, index)
        if first != index:
            raise ModelFormatError(
                f"tokenizer.ggml.tokens: {shown(token)} stands at {first} and at {index}; tokens must differ"
            )
    return vocab


def _types(metadata: dict[str, Any], n_tokens: int, required: bool = False) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None and not required:
        return [NORMAL] * n_tokens
    if not isinstance(types, list) or len(types) != n_tokens:
        found = len(types) if isinstance(types, list) else type(types).__name__
        raise ModelFormatError(f"tokenizer.ggml.token_type: expected {n_tokens} numbers, one per token, found {found}")
    for index, token_type in enumerate(types):
        if isinstance(token_type, bool) or not isinstance(token_type, int) or not NORMAL <= token_type <= BYTE:
            raise ModelFormatError(f"tokenizer.ggml.token_type[{index}]: expected 1 to 6, found {shown(token_type)}")
    return list(types)


def _merges(metadata: dict[str, Any], vocab: dict[str, int]) -> list[list[str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ModelFormatError(f"tokenizer.ggml.merges: expected a list of strings, found {shown(merges)}")
    if len(merges) > MAX_MERGES:
        raise ModelFormatError(f"tokenizer.ggml.merges: {len(merges)} merges, at most {MAX_MERGES} are allowed")
    pairs = []
    for index, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2 or not parts[0] or not parts[1]:
            raise ModelFormatError(
                f"tokenizer.ggml.merges[{index}]: expected two tokens with a space between, found {shown(merge)}"
            )
        for token in (*parts, parts[0] + parts[1]):
            if token not in vocab:
                raise ModelFormatError(
                    f"tokenizer.ggml.merges[{index}]: {shown(merge)} needs {shown(token)}, which is no token"
                )
        pairs.append(parts)
    return pairs


def _token_id(metadata: dict[str, Any], name: str, n_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if index is None or index in NO_TOKEN:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n_tokens:
        raise ModelFormatError(f"{key}: expected an id from 0 to {n_tokens - 1}, found {shown(index)}")
    return index


def _flag(metadata: dict[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise ModelFormatError(f"tokenizer.ggml.{name}: expected true or false, found {shown(value)}")
    return value


def _config(metadata: dict[str, Any], tokens: list[str], default_add_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json, except for what depends on the kind of vocabulary."""
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {key: _token_id(metadata, name, len(tokens)) for key, name in names.items()}
    config: dict[str, Any] = {key: None if index is None else tokens[index] for key, index in ids.items()}
    config["add_bos_token"] = _flag(metadata, "add_bos_token", default_add_bos)
    config["add_eos_token"] = _flag(metadata, "add_eos_token", False)
    config["clean_up_tokenization_spaces"] = False
    template = _chat_template(metadata)
    if template is not None:
        config["chat_template"] = template
    return config


def _chat_template(metadata: dict[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or, where the file has more than one, Hugging Face's list of named ones."""
    prefix = "tokenizer.chat_template"
    templates = {key: value for key, value in metadata.items() if key == prefix or key.startswith(prefix + ".")}
    for key, value in templates.items():
        if not isinstance(value, str) or len(value) > MAX_TEMPLATE_CHARS:
            raise ModelFormatError(
                f"{key}: expected a string of at most {MAX_TEMPLATE_CHARS} characters, found {shown(value)}"
            )
    if len(templates) > 1:
        names = {key: key[len(prefix) + 1 :] or "default" for key in templates}
        return [{"name": names[key], "template": value} for key, value in templates.items()]
    return templates.get(prefix)


def _post_processor(config: dict[str, Any], vocab: dict[str, int]) -> dict[str, Any] | None:
    """The opening and closing token as a template, so that the file is whole by itself."""
    first = config["bos_token"] if config["add_bos_token"] else None
    last = config["eos_token"] if config["add_eos_token"] else None
    if first is None and last is None:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        inner = [{"Sequence": {"id": sequence, "type_id": type_id}}]
        before = [{"SpecialToken": {"id": first, "type_id": type_id}}] if first else []
        after = [{"SpecialToken": {"id": last, "type_id": type_id}}] if last else []
        return [*before, *inner, *after]

    special = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (first, last) if token}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": special,
    }
