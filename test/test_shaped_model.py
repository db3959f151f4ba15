"""Model folders without weights: they load, with a real tokenizer, and no checkpoint is written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.common import shaped_model
from benchmark.common.errors import BenchmarkError
from benchmark.common.kv_bytes import kv_bytes_per_token, load_config


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A model folder whose tokenizer has four words and one token more."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    content = {"model": {"vocab": {"a": 0, "b": 1, "c": 2, "d": 3}}, "added_tokens": [{"id": 4, "content": "<s>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 4, "vocab_size": 999}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_it_loads_with_transformers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "new" / "llama"
    assert shaped_model.main([str(out), "--tokenizer", str(model)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    config = AutoConfig.from_pretrained(out)
    assert (config.architectures, config.vocab_size) == (["LlamaForCausalLM"], 49152)
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (32, 4096, 14336)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert config.max_position_embeddings == 140_000
    assert config.rope_parameters["rope_theta"] == 500_000
    assert str(config.dtype) == "torch.bfloat16"
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": "What is Lisbon known for?"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    assert kv_bytes_per_token(load_config(str(out))) == 131_072
    assert not list(out.glob("*.safetensors"))


def test_smaller_ones(tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, layers, hidden in (([], 32, 4096), (["--layers", "4"], 4, 4096), (["--small"], 2, 256)):
        # Into the same folder: what it wrote itself it may write again.
        assert shaped_model.main([str(out), "--tokenizer", str(tokenizer), *options]) == 0
        config = load_config(str(out))
        assert (config["num_hidden_layers"], config["hidden_size"]) == (layers, hidden)
        assert (config["vocab_size"], config["eos_token_id"]) == (5, 4)
        assert "bos_token_id" not in config


def test_no_checkpoint_is_written_over(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tokenizer / "config.json").read_bytes()
    assert shaped_model.main([str(tokenizer), "--tokenizer", str(tokenizer)]) == 2
    assert "holds model.safetensors" in capsys.readouterr().err
    assert (tokenizer / "config.json").read_bytes() == before
    (tokenizer / "model.safetensors").unlink()
    with pytest.raises(BenchmarkError, match="the tokenizer itself"):
        shaped_model.write_shaped_model(tokenizer, tokenizer)
    with pytest.raises(BenchmarkError, match=r"--tokenizer: no tokenizer\.json in"):
        shaped_model.write_shaped_model(tmp_path / "out", tmp_path)
