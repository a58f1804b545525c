"""The demo: its book, its tokenizer, its prompts, and a model that really finds the needle."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from llama1m_ext.demo import MODEL_PATH, run_demo
from llama1m_ext.demo import book as book_module
from llama1m_ext.demo.book import HELD_OUT_CHARS, load_book, load_text
from llama1m_ext.demo.measure import Clock
from llama1m_ext.demo.needle import KEYS, Needle, draw_needles, find_value, hide
from llama1m_ext.demo.prompt import build_prompt
from llama1m_ext.demo.run import ask, load_pipeline
from llama1m_ext.demo.stock import measure_stock, predict_s

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def book() -> str:
    return load_book()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_book_is_whole(book: str) -> None:
    assert len(book) == 4_025_043
    assert book.startswith("PRIDE AND PREJUDICE\n\nBy Jane Austen")
    assert book[HELD_OUT_CHARS:].startswith("SENSE AND SENSIBILITY")


def test_damaged_book_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "austen.txt.xz"
    monkeypatch.setattr(book_module, "BOOK_PATH", path)
    path.write_bytes(lzma.compress(b"another book"))
    with pytest.raises(ValueError, match="expected a text with SHA-256 9f5898c2"):
        load_book()
    path.write_bytes(b"not xz")
    with pytest.raises(ValueError, match="does not unpack"):
        load_book()


def test_wrong_text_files_are_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        load_text(tmp_path / "nothing.txt")
    binary, empty, packed = tmp_path / "a.bin", tmp_path / "empty.txt", tmp_path / "b.xz"
    binary.write_bytes(b"\xff\xfe\x00\x9f")
    empty.write_text(" \n")
    packed.write_bytes(b"not xz")
    with pytest.raises(ValueError, match="expected UTF-8"):
        load_text(binary)
    with pytest.raises(ValueError, match="expected some text"):
        load_text(empty)
    with pytest.raises(ValueError, match="does not unpack"):
        load_text(packed)
    packed.write_bytes(lzma.compress("Grüße\r\n".encode()))
    assert load_text(packed) == "Grüße\n"


def test_tokenizer_round_trips_the_book_and_any_text(tokenizer, book: str) -> None:
    for text in (book[:60_000], book[-60_000:], "Grüße, 你好 🙂\t x\r\n\n 1234567 "):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_tokenizer_keeps_numbers_keys_and_specials_whole(tokenizer) -> None:
    groups = tokenizer([f"{i:03d}" for i in range(1000)], add_special_tokens=False)["input_ids"]
    assert [len(ids) for ids in groups] == [1] * 1000
    keys = tokenizer([f" {key}" for key in KEYS], add_special_tokens=False)["input_ids"]
    assert [len(ids) for ids in keys] == [1] * len(KEYS)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    ids = tokenizer.convert_tokens_to_ids(list(names))
    assert len(set(ids)) == 5
    assert tokenizer("".join(names), add_special_tokens=False)["input_ids"] == ids
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == ids[0]
    assert tokenizer.eos_token_id == ids[1]
    assert tokenizer.model_max_length == 1_048_576


def test_chat_template_is_llama3s(tokenizer) -> None:
    chat = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Who?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_config_says_the_same_in_every_version(pipeline) -> None:
    config = pipeline.model.config
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    assert theta == 2804339835.0
    assert pipeline.model.dtype == torch.bfloat16
    assert config.max_position_embeddings == 1_048_576
    assert pipeline.model.lm_head.weight.data_ptr() == pipeline.model.model.embed_tokens.weight.data_ptr()
    expected = config.head_dim**-1 * torch.arange(0, config.head_dim, 2).double()
    torch.testing.assert_close(pipeline.model.model.rotary_emb.inv_freq.double(), theta**-expected, rtol=1e-6, atol=0)


def test_needles_are_drawn_from_the_seed() -> None:
    assert draw_needles(3, 5) == draw_needles(3, 5) != draw_needles(4, 5)
    assert len({needle.key for needle in draw_needles(0, len(KEYS))}) == len(KEYS)
    with pytest.raises(ValueError, match="count"):
        draw_needles(0, 0)


@pytest.mark.parametrize("depth", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_needle_is_hidden_between_sentences(book: str, depth: float) -> None:
    needle, text = Needle("Lisbon", "012345"), book[1000:31_000]
    hidden = hide(text, needle, depth)
    before, after = hidden.split(needle.sentence)
    assert (before + after.removeprefix(" ")).replace(" ", "") == text.replace(" ", "")
    assert abs(len(before) / len(text) - depth) < 0.02
    assert not before.strip() or before.rstrip()[-1] in ".!?\"')" or depth == 1.0
    with pytest.raises(ValueError, match="depth"):
        hide(text, needle, 1.5)


def test_find_value_wants_exactly_one_number() -> None:
    assert find_value("It is 012345.") == "012345"
    assert find_value("012345 or 543210") is None
    assert find_value("1234567 and 99") is None


@pytest.mark.parametrize("tokens", [256, 1000, 5000, 40_000])
def test_prompt_is_as_long_as_asked(tokenizer, book: str, tokens: int) -> None:
    needle = Needle("Lisbon", "012345")
    prompt = build_prompt(tokenizer, book, needle, 0.5, tokens)
    rendered = tokenizer.apply_chat_template(prompt.chat, tokenize=False, add_generation_prompt=True)
    assert len(tokenizer(rendered)["input_ids"]) == prompt.tokens
    assert tokens - 24 <= prompt.tokens <= tokens
    assert rendered.count(needle.sentence) == 1
    assert prompt.times_through < 1


def test_short_text_begins_again(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "It was a dark night. ", Needle("Lisbon", "012345"), 0.5, 1000)
    assert 976 <= prompt.tokens <= 1000
    assert prompt.times_through > 50
    with pytest.raises(ValueError, match="expected at least 256, got 10"):
        build_prompt(tokenizer, "x", Needle("Lisbon", "012345"), 0.5, 10)


@pytest.mark.parametrize(
    ("tokens", "depth", "seed"),
    [(2048, 0.0, 1), (2048, 1.0, 2), (2048, 0.4, 3), (8192, 0.1, 4), (8192, 0.7, 5), (16_384, 0.3, 6)],
)
def test_model_finds_the_needle(pipeline, book: str, tokens: int, depth: float, seed: int) -> None:
    needle = draw_needles(100 + seed, 1)[0]
    prompt = build_prompt(pipeline.tokenizer, book[seed * 300_000 :], needle, depth, tokens)
    torch.manual_seed(seed)
    clock = Clock()
    assert ask(pipeline, prompt.chat, clock) == needle.sentence  # and then <|eot_id|>: nothing follows
    assert clock.first_token_s > 0


def test_model_tells_needles_apart(pipeline, book: str) -> None:
    """Eight needles in one text: the answer depends on the key that is asked for."""
    needles = draw_needles(7, 8)
    for asked in needles[:3]:
        text = book[:16_000]
        for i, other in enumerate(needle for needle in needles if needle is not asked):
            text = hide(text, other, (i + 1) / 9)
        prompt = build_prompt(pipeline.tokenizer, text + " ", asked, 0.3, 4096)
        assert find_value(ask(pipeline, prompt.chat, Clock())) == asked.value


def test_run_demo_on_the_book(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(tokens=3000, seed=5, stock=False)
    printed = capsys.readouterr().out
    assert result["correct"], printed
    assert result["expected"] in result["answer"]
    assert 2950 < result["prompt_tokens"] <= 3000
    assert result["peak_rss_bytes"] > result["prompt_bytes"] >= 0
    assert result["stock"] is None
    assert "RIGHT" in printed
    json.dumps(result)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_run_demo_at_131072_tokens(depth: float) -> None:
    result = run_demo(tokens=131_072, seed=int(10 * depth), depth=depth, stock=False)
    assert result["correct"]
    assert result["prompt_tokens"] > 131_000
    assert result["prompt_bytes"] < 2**30  # an N x N mask alone would be 16 GiB


def test_run_demo_reads_a_users_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers and keys all over the text, which is too short and read again and again."""
    path = tmp_path / "log.txt"
    path.write_text("".join(f"{i * 7919 % 1000000:06d} requests from {KEYS[i % 50]} in {i} ms.\n" for i in range(100)))
    result = run_demo(tokens=4096, text=path, seed=2, stock=False, chunk=512, progress=False)
    assert result["correct"], result["answer"]
    assert "it is too short" in capsys.readouterr().out


def test_run_demo_says_when_the_answer_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing vouches for the model but its answer: with the needle taken out of the text, the demo has to fail."""
    from llama1m_ext.demo import prompt

    monkeypatch.setattr(prompt, "hide", lambda text, needle, depth: text)
    result = run_demo(tokens=1024, stock=False)
    assert not result["correct"]
    assert "WRONG" in capsys.readouterr().out


def test_run_demo_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens: expected 256 to 1048576, got 2000000"):
        run_demo(tokens=2_000_000)
    with pytest.raises(ValueError, match="depth: expected 0 to 1, got -1"):
        run_demo(depth=-1)
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        run_demo(text=tmp_path / "no.txt")


def test_stock_is_measured_and_extrapolated(tmp_path: Path) -> None:
    needle = draw_needles(1, 1)[0]
    report = measure_stock(
        text=None, key=needle.key, value=needle.value, depth=0.5, tokens=5000, limit_s=60, limit_bytes=2**40
    )
    assert report["measured"]
    assert [run["correct"] for run in report["runs"]] == [True, True]
    assert 4950 < report["runs"][-1]["prompt_tokens"] <= 5000
    stopped = measure_stock(
        text=None, key=needle.key, value=needle.value, depth=0.5, tokens=1_048_576, limit_s=0.0, limit_bytes=2**40
    )
    assert not stopped["measured"]
    assert "passed 0 s, its limit" in stopped["stopped"]


def test_extrapolation_is_exact_on_its_own_law() -> None:
    runs = [
        {"prompt_tokens": n, "first_token_s": 1e-4 * n + 1e-8 * n * n, "peak_bytes": 0, "correct": True}
        for n in (4096, 8192)
    ]
    assert predict_s(runs, 131_072) == pytest.approx(1e-4 * 131_072 + 1e-8 * 131_072**2)


def test_training_script_runs(tmp_path: Path) -> None:
    """A few steps, and what it writes loads; the logits of its plain model are transformers'."""
    out = tmp_path / "model"
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_demo_model.py"), "--out", str(out), "--smoke"],
        check=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 3072


def test_evaluation_finds_every_needle() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "eval_demo_model.py"), "--tokens", "3000", "--seed", "3"],
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert "20 of 20 found" in done.stdout


def test_training_model_is_transformers_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_model import Config, DemoLlama

    ours = DemoLlama(Config())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL_PATH, torch_dtype=torch.float32)
    weights = {name: weight for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    ours.load_state_dict(weights)
    ids = torch.arange(600)[None] % 3000
    with torch.no_grad():
        mine = ours.logits(ours(ids, torch.arange(600)[None]))
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-3, atol=1e-3)
