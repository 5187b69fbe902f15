"""ModelService files: what is accepted, how paths are resolved, one sentence for each fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from layercast_cli.errors import UsageError
from layercast_cli.modelfile import load_services
from layercast_cli.settings import default_model_dir

SAMPLES = Path(__file__).parents[2] / "manifests/samples"
HEAD = "apiVersion: layercast.dev/v1alpha1\nkind: ModelService\n"
GOOD = HEAD + "metadata: {name: a}\nspec: {model: {source: 'hf://org/name'}}\n"


def test_the_samples_are_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_services(SAMPLES / "minimal.yaml")[0]["spec"]["replicas"] == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="which does not exist"):
        load_services(SAMPLES / "smollm2.yaml")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    default_model_dir().mkdir(parents=True)
    assert (
        load_services(SAMPLES / "smollm2.yaml")[0]["spec"]["model"]["source"]
        == f"file://{default_model_dir()}"
    )


def test_a_source_relative_to_its_file(tmp_path: Path) -> None:
    file = tmp_path / "services/a.yaml"
    file.parent.mkdir()
    (tmp_path / "models").mkdir()
    file.write_text(GOOD.replace("hf://org/name", "file://../models"))
    assert load_services(file)[0]["spec"]["model"]["source"] == f"file://{tmp_path}/models"


def test_several_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(GOOD + "---\n" + GOOD.replace("name: a", "name: b") + "---\n")
    assert [each["metadata"]["name"] for each in load_services(file)] == ["a", "b"]
    file.write_text(GOOD + "---\n" + GOOD)
    with pytest.raises(UsageError, match="the name a is given twice"):
        load_services(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no ModelService"),
        ("a: [", "is not valid YAML"),
        ("- 1\n", "a ModelService is a mapping"),
        ("kind: Pod\napiVersion: v1\n", "expected apiVersion: layercast.dev/v1alpha1 and kind: ModelService"),
        (HEAD + "metadata: {name: Big_Name}\n", "metadata.name must be lower-case"),
        (HEAD + "metadata: {name: ../../etc}\n", "metadata.name must be lower-case"),
        (HEAD + "metadata: {name: a}\nspec: {model: {source: gpt}}\n", "spec.model.source must be a URL"),
        (GOOD.replace("spec: {", "spec: {replicas: many, "), "spec.replicas must be a number"),
        (GOOD.replace("spec: {", "spec: {replicas: -1, "), "spec.replicas must be a number, 0 or more"),
    ],
)
def test_faults_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_services(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        load_services(tmp_path / "none.yaml")
