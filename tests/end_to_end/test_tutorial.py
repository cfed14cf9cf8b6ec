"""The tutorial notebook: the committed one holds a whole run; it runs in a few steps, in a folder of its own."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
FEW = "VIDEOS, HELD_OUT = 24, 3\nAUTOENCODER_STEPS = FLOW_STEPS = 2\n"


def test_the_committed_notebook_ran_from_its_first_cell_to_its_last() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result", "display_data"}
    assert {"image/png", "image/gif"} <= {kind for output in outputs for kind in output.get("data", ())}
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.long
def test_the_notebook_runs_and_writes_to_its_own_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "of_jupyter"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (sizes,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    sizes.source = FEW
    folder = tmp_path / "folder"
    folder.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # a command that fails leaves the next cells without its files
    assert [path.name for path in folder.iterdir()] == ["tutorial"]
    made = folder / "tutorial"
    assert json.loads((made / "runs/tutorial/evaluation.json").read_text())["clips"]
    assert (made / "runs/tutorial/predictions/clip.gif").is_file()
