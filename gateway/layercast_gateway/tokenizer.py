"""Text to tokens and back for one checkpoint, from the small files that its workers hand out.

The checkpoint's own tokenizer.json does the work (Hugging Face's `tokenizers`, in Rust); chat templates are Jinja,
run in a sandbox because they come with the model. Nothing here needs torch or transformers.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

from layercast_gateway.detokenize import REPLACEMENT
from layercast_gateway.errors import ClientError, ServiceError

BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _GenerationTag(jinja2.ext.Extension):
    """Accepts `{% generation %}`, with which some templates mark the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 the class attribute is Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: these messages are not for this model."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no template of a model expects.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)  # the local day, as templates expect


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: that of transformers' apply_chat_template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ModelText:
    """Encodes prompts, renders chats and decodes tokens of one checkpoint. Safe to use from several threads."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files` by name: tokenizer.json is required, the others are used when present.

        Raises ServiceError naming the file that is missing or broken.
        """
        if "tokenizer.json" not in files:
            raise ServiceError("The model's checkpoint has no tokenizer.json.", code="tokenizer_unusable")
        try:
            self._tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises plain Exception
            raise ServiceError(
                f"The model's tokenizer.json cannot be read: {error}", code="tokenizer_unusable"
            ) from error
        # A file may have been saved with these on; prompts are never cut or padded silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = _json_file(files, "tokenizer_config.json")
        self._special_texts = {
            name: text for name in _SPECIAL_NAMES if (text := _token_text(self._config.get(name))) is not None
        }
        self._template = _compile(_template_text(files, self._config))
        kinds = _decoder_kinds(files["tokenizer.json"])
        self._byte_of = _byte_alphabet() if "ByteLevel" in kinds else None
        self.joins_bytes = kinds == {"ByteLevel"}
        """Whether a text is nothing but the bytes of its tokens, one behind the other."""
        self._alone: dict[int, str | None] = {}
        self.vocabulary_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.stop_token_ids: tuple[int, ...] = self._stop_ids(files)
        longest = _json_file(files, "config.json").get("max_position_embeddings")
        self.context_length_max: int = longest if isinstance(longest, int) else 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a plain prompt, with whatever the tokenizer puts around it (a BOS token)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer.

        ClientError when the model has no chat template or its template refuses the messages.
        """
        return self._encode(self.render(messages), add_special_tokens=False)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        # The one call that does not also find out where in the text each token lies, which takes a third longer.
        encoded = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return tuple(encoded[0].ids)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's chat template writes it."""
        if self._template is None:
            raise ClientError(
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._special_texts
            )
        except _TemplateRefusal as error:
            message = f"The model's chat template refuses these messages: {error}"
            raise ClientError(message, param="messages") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            message = f"The model's chat template fails for these messages: {error}"
            raise ServiceError(message, code="chat_template_failed") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_alone(self, token_id: int) -> str | None:
        """What a token adds to any text that ends with a whole character; None when that depends on the text.

        Where bytes are joined and nothing else, a token of whole characters is always the same text.
        """
        try:
            return self._alone[token_id]
        except KeyError:
            text = self.decode([token_id]) if self.joins_bytes else REPLACEMENT
            # The map grows to the size of the vocabulary at most: other ids are no tokens of a worker.
            known = self._alone[token_id] = None if REPLACEMENT in text else text
            return known

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; empty for an id outside the vocabulary."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of is not None and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if fallback := BYTE_FALLBACK.fullmatch(token):
            return bytes([int(fallback[1], 16)])
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def _stop_ids(self, files: Mapping[str, bytes]) -> tuple[int, ...]:
        """End-of-sequence ids of every file that names some: they do not always agree."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            config = _json_file(files, name)
            inner = config.get("text_config")
            for ids in (
                config.get("eos_token_id"),
                inner.get("eos_token_id") if isinstance(inner, dict) else None,
            ):
                found.update(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
        if (text := self._special_texts.get("eos_token")) is not None:
            token_id = self._tokenizer.token_to_id(text)
            found.update([token_id] if token_id is not None else [])
        return tuple(sorted(found))


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _json_file(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ServiceError(f"The model's {name} is not JSON: {error}", code="tokenizer_unusable") from error
    return value if isinstance(value, dict) else {}


def _token_text(value: Any) -> str | None:
    """A special token is written as a string or as an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_text(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The default chat template: a file of its own, or in the configuration, there alone or in a named list."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _compile(text: str | None) -> jinja2.Template | None:
    if text is None:
        return None
    try:
        return _environment().from_string(text)
    except jinja2.TemplateError as error:
        raise ServiceError(
            f"The model's chat template cannot be read: {error}", code="tokenizer_unusable"
        ) from error


class _TokenizerFile(msgspec.Struct):
    """The one part of tokenizer.json that is read here; the vocabulary is skipped without making objects of it."""

    decoder: dict[str, Any] | None = None


def _decoder_kinds(file: bytes) -> set[str]:
    """The types of the decoder's steps."""
    decoder = msgspec.json.decode(file, type=_TokenizerFile).decoder or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return {str(step.get("type")) for step in steps}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet
