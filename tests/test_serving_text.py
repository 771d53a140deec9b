"""Text in and out of serving: tokenizers, held-back characters, stop strings, key=value settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from serving.options import parse_options
from serving.text import TextStream
from serving.tokenizers import Bytes, FromFile, load_tokenizer


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_a_stream_is_the_text_up_to_the_first_stop_string(text: str, stop: list[str], step: int) -> None:
    tokens = Bytes().encode(text)
    stream = TextStream(Bytes(), stop)
    shown = "".join(stream.push(tokens[i : i + step]) for i in range(0, len(tokens), step)) + stream.close()
    at = min((text.find(s) for s in stop if s in text), default=len(text))
    if "\ufffd" not in text:
        assert shown == text[:at]
        assert stream.stopped == (at < len(text))


def test_a_character_is_shown_whole_and_broken_ones_are_shown_as_such() -> None:
    stream = TextStream(Bytes())
    assert [stream.push([byte]) for byte in "é".encode()] == ["", "é"]
    assert stream.push(["é".encode()[0]]) == ""
    assert stream.close() == "\ufffd"
    with pytest.raises(ValueError, match="empty"):
        TextStream(Bytes(), ["a", ""])


def test_what_might_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Bytes(), ["\n\nuser:"])
    pieces = [stream.push(Bytes().encode(p)) for p in ("hi", "\n", "there\n\nus", "er: no")]
    assert pieces == ["hi", "", "\nthere", ""]
    assert stream.stopped
    assert stream.push(Bytes().encode("more")) == stream.close() == ""


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["<end>", "<user>", "<bot>"])
    library.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    settings = {"eos_token": {"content": "<end>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_public_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, ModelConfig(vocab_size=300))
    assert isinstance(tokenizer, FromFile)
    assert tokenizer.eod == 256
    assert tokenizer.decode(tokenizer.encode("naïve → text")) == "naïve → text"
    chat = tokenizer.encode_chat([{"role": "user", "content": "hé"}])
    assert chat == [257, *tokenizer.encode("hé"), 258]
    for template in ("{{ raise_exception('users only') }}", "{{ nothing.at.all }}", "{% if %}"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ValueError, match=r"chat template.*(users only|nothing|Expected an expression)"):
            FromFile(tmp_path).encode_chat([{"role": "user", "content": "hé"}])
    stream = TextStream(tokenizer)
    assert "".join(stream.push([t]) for t in tokenizer.encode("naïve → text")) == "naïve → text"
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="chat_template"):
        FromFile(tmp_path).encode_chat([])


def test_bytes_only_fit_a_model_of_bytes(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path, ModelConfig()), Bytes)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, ModelConfig(vocab_size=300))
    assert Bytes().decode(Bytes().encode_chat([{"role": "user", "content": "hi"}])) == "user: hi\n\nassistant:"


@dataclass
class Settings:
    text: str = "?"
    count: int = 3
    rate: float = 0.5
    on: bool = False
    words: list[str] = field(default_factory=list)
    maybe: str | None = None


def test_settings_are_typed_and_text_is_literal() -> None:
    words = ["text=def f(x): # a: [1", "count=7", "rate=1", "on=true", 'words=["\\n\\n", a]', "maybe=1"]
    assert parse_options(Settings, words) == Settings("def f(x): # a: [1", 7, 1.0, True, ["\n\n", "a"], "1")
    assert parse_options(Settings, ["text="]).text == ""
    for text in ("echo ${text} ${count} ${none}", "???", "\\${x}"):
        assert parse_options(Settings, [f"text={text}"]).text == text
    assert parse_options(Settings, ['words=["${count}"]']).words == ["${count}"]
    assert parse_options(Settings, ["maybe=a", "maybe=null"]).maybe is None
    for word, message in (
        ("count=x", "count=x"),
        ("colour=1", "colour.*text, count"),
        ("text", "key=value"),
        ("words=a", "list of texts"),
        ("words=[1]", "list of texts"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_options(Settings, [word])
