"""Remote folders of models and processors, wherever a local one may be given."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import bigmac_lightning
from bigmac_lightning.checkpoints.fetching import local_folder
from bigmac_lightning.commands.export import export_checkpoint
from bigmac_lightning.datamodules.encoding.processors import load_processor
from bigmac_lightning.models import HFDecoder, MultimodalLM
from tests.cli.test_exported import _assert_equal, _run_with_a_config

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of how Lightning calls its parser


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty file system in memory, and a home without copies."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def _copies(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "home/.cache/bigmac_lightning/folders").iterdir() if path.is_dir()]


def test_wherever_a_local_one_may_be_given(system: Any, tmp_path: Path) -> None:
    here, there = tmp_path / "there", "memory://bucket/there"
    here.mkdir()
    expected = _run_with_a_config(here)
    export_checkpoint(str(here / "run" / "checkpoints" / "x.ckpt"), "memory://bucket/out")
    system.put(str(here / "decoder"), "/bucket/there/decoder", recursive=True)
    run = bigmac_lightning.load("memory://bucket/out", device="cpu")
    _assert_equal(run.module.state_dict(), expected)
    assert len([*run.generate(run.prompt("hello"), max_new_tokens=2)]) <= 2
    assert load_processor(f"{there}/decoder")[0].get_vocab() == load_processor(str(here / "decoder"))[0].get_vocab()
    weightless = HFDecoder(f"{there}/decoder")
    assert sum(any(copy.glob("*.safetensors")) for copy in _copies(tmp_path)) == 1, "a config needs no weights"
    whole = HFDecoder(str(here / "decoder")).config
    assert weightless.config.to_dict() | {"_name_or_path": ""} == whole.to_dict() | {"_name_or_path": ""}
    started = MultimodalLM.from_pretrained("memory://bucket/out")
    assert started.llm.source == "memory://bucket/out", "a checkpoint of it names the folder, and not the copy"  # pyright: ignore
    started.configure_model()
    state = started.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    number = len(_copies(tmp_path))
    local_folder("memory://bucket/out", weights=True)
    assert len(_copies(tmp_path)) == number, "it is fetched once"
    system.pipe("/bucket/out/config.json", system.cat("/bucket/out/config.json") + b" ")
    local_folder("memory://bucket/out", weights=True)
    assert len(_copies(tmp_path)) == number + 1, "it has changed"


def test_what_cannot_be_read(system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = (local_folder, HFDecoder, load_processor, MultimodalLM.from_pretrained)
    for use in uses:
        with pytest.raises(
            ValueError, match="folder memory://bucket/none cannot be read: FileNotFoundError: there is no"
        ):
            use("memory://bucket/none")
        with pytest.raises(ValueError, match=r"gs://bucket/a cannot be read: ImportError: .*pip install gcsfs"):
            use("gs://bucket/a")
        with pytest.raises(ValueError, match="https://a/b is an address of a web server, which does not list a folder"):
            use("https://a/b")
    system.pipe("/bucket/a/config.json", b"{}")
    system.store["/bucket/a/../../x.json"] = system.store["/bucket/a/config.json"]
    with pytest.raises(ValueError, match=r"x.json' has a name that leads out of it"):
        local_folder("memory://bucket/a")
    del system.store["/bucket/a/../../x.json"]
    get = type(system).get_file
    monkeypatch.setattr(type(system), "get_file", lambda own, *a, **k: (get(own, *a, **k), Path(a[1]).write_bytes(b"")))
    with pytest.raises(ValueError, match=r"config\.json has 0 bytes here, and 2 there"):
        local_folder("memory://bucket/a")
    assert not _copies(tmp_path)
