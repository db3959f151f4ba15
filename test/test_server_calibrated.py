"""A server that begins with a calibration from a file, renews it, and selects the tokens that it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.common.cpu import CPU_FLAGS
from benchmark.common.kv_bytes import load_config
from benchmark.common.text import make_text
from benchmark.quality.prompting import Prompter
from real_server import COMMON, Launch, Server, Servers, run_python
from sglang_mosaic.codec.storage import load_epoch
from test_server_shared_prefix import NEEDLES, QUESTIONS, notes_with, recall

pytestmark = pytest.mark.server

RATIO, KV_MIB = 4.0, 111
ENGINE = (*CPU_FLAGS.split(), "--max-running-requests", "4")


@pytest.fixture(scope="module")
def calibration(model: Path, servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration made by the command, of prose that the server will not see."""
    folder = tmp_path_factory.mktemp("calibration")
    text, file = folder / "text", folder / "calibration.safetensors"
    text.write_text(make_text(3000, "calibration"))
    servers.make_room()
    command = ("-m", "sglang_mosaic.cli", "calibrate", "--text", str(text), "--output", str(file))
    sizes = ("--tokens", "2048", "--passages", "2", "--mosaic-ratio", str(RATIO))
    done = run_python(*command, *sizes, "--model-path", str(model), *ENGINE, timeout_s=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "32 pages seen" in done.stdout and load_epoch(file).hash in done.stdout
    return file


@pytest.fixture(scope="module")
def server(calibration: Path, servers: Servers) -> Server:
    flags = ("--mosaic-encode", "seal", "--mosaic-ratio", str(RATIO), "--mosaic-calibration", str(calibration))
    select = ("--mosaic-select", "0.2", "--mosaic-select-from", "256", "--mosaic-select-steps", "3")
    more = ("--mosaic-refresh-pages", "8", "--mosaic-kv-mib", str(KV_MIB), "--mosaic-audit")
    servers.launches["calibrated"] = Launch("sglang_mosaic.launch_server", (*COMMON, *flags, *select, *more))
    return servers["calibrated"]


def test_it_begins_with_the_calibration_of_the_file(server: Server, calibration: Path) -> None:
    stats = server.stats()
    assert (stats["epoch"], stats["epochs_started"]) == (load_epoch(calibration).hash, 1)


def test_the_ratio_is_of_all_bytes(server: Server, model: Path) -> None:
    stats, config = server.stats(), load_config(str(model))
    dim = config["hidden_size"] // config["num_attention_heads"]
    bf16 = config["num_hidden_layers"] * config["num_key_value_heads"] * 2 * dim * 64 * 2
    assert stats["frame_bytes_dense"] == bf16
    assert stats["ratio"] == bf16 / stats["frame_bytes_mosaic"]
    assert RATIO <= stats["ratio"] < 1.001 * RATIO
    frames = (stats["dense_frames"] + 1) * bf16 + stats["mosaic_frames"] * stats["frame_bytes_mosaic"]
    assert frames < stats["kv_bytes"] <= KV_MIB * 2**20, "the codec's tables come on top of the frames"


def test_codes_are_found_in_a_fifth_of_the_tokens_of_several_epochs(server: Server, model: Path) -> None:
    prompter = Prompter(str(model))
    for place, code, where in NEEDLES:
        notes = notes_with(place, code, where)
        users = [recall(server, prompter, notes, question, place, code) for question in QUESTIONS]
        assert all(user.first_choice for user in users), f"{place}, {code}: {users}"
        assert min(user.cached_tokens for user in users[1:]) > 1000, users
    stats = server.stats()
    assert stats["epochs_started"] > 1 and stats["pages_encoded"] > 60
    assert all(0 < error < 1 for error in stats["error_by_layer"])


def test_decoding_goes_on_for_many_steps_and_leaves_nothing_behind(server: Server) -> None:
    audits = server.stats()["audits"]
    answers = [server.generate(make_text(700, f"decode {i}"), 40) for i in range(2)]
    assert all(len(answer.tokens) == 40 for answer in answers)
    server.wait_for_audit(audits)
    assert server.trouble() == []
