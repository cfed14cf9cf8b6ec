"""What mkdocs needs to show README.md and docs/ as they are: they are written for GitHub."""

import json
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README.md is the home page; notebooks are pages, with the outputs that they were saved with."""
    readme = Path(config.config_file_path).with_name("README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        cells = json.loads(notebook.content_string)["cells"]
        text = "\n\n".join(part for cell in cells for part in parts(cell))
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=text))
        files.remove(notebook)
    return files


def parts(cell: dict[str, Any]) -> list[str]:
    """A cell of a notebook in Markdown: its text, or its code and what that printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    found = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {"text/plain": output.get("text", "")})
        picture = next((kind for kind in ("image/png", "image/jpeg", "image/gif") if kind in data), None)
        if picture:
            found.append(f"![output](data:{picture};base64,{''.join(data[picture]).replace(chr(10), '')})")
        elif text := "".join(data.get("text/plain", "")).rstrip():
            found.append(f"```text\n{text}\n```")
    return found


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Code that the tests do not run says so, and why; links lead to the pages above."""
    markdown = re.sub(r"^<!-- (not run: .+) -->\n```(\w+)$", r'```\2 title="\1"', markdown, flags=re.MULTILINE)
    return re.sub(r"(\]\(\w+)\.ipynb", r"\1.md", markdown.replace("](../README.md", "](index.md"))


class SpacedSections(Extension):
    """Our docstrings have no blank line before `Returns:`, which griffe wants to see a section there."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"\n+(Returns|Raises|Yields):\n", r"\n\n\1:\n", obj.docstring.value)
