"""The methods section and its references, put together from what was done.

Each stage keeps the text of its methods beside its algorithm (`METHODS`); here the paragraphs that apply are
put in order, and citation keys (`[@key]`) are resolved in `references.bib`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from dsiprep.data.results import UnitResults
from dsiprep.engines import ants, freesurfer, tortoise
from dsiprep.report.page_parts import write_atomically
from dsiprep.stages import (
    acquisition,
    anatomy,
    coregister,
    denoise,
    distortion,
    fieldmap,
    fieldmapless,
    motion,
    quality,
    resample,
    structural_average,
)

BIBLIOGRAPHY = Path(__file__).with_name("references.bib")
CORRECTIONS = {**distortion.METHODS, **fieldmap.METHODS, **fieldmapless.METHODS, **tortoise.METHODS}
DASH = "\N{EN DASH}"
KEY = re.compile(r"@([A-Za-z][\w-]*)")
GROUP = re.compile(r"\[(@[A-Za-z][\w-]*(?:\s*;\s*@[A-Za-z][\w-]*)*)\]")


@dataclass(frozen=True)
class Reference:
    """One entry of the bibliography: key, fields by lower-case name, and its BibTeX text."""

    key: str
    fields: dict[str, str]
    text: str

    @property
    def authors(self) -> list[str]:
        """Family names."""
        people = re.split(r"\s+and\s+", self.fields.get("author", ""))
        return [_plain(person.split(",")[0]) for person in people]

    @property
    def short(self) -> str:
        """ "Cieslak et al. 2021"."""
        names = self.authors
        who = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
        return f"{who} {self.fields.get('year', '')}".strip()

    @property
    def line(self) -> str:
        """Authors, year, title, where, DOI: one line of a list of references."""
        people = [_plain(person) for person in re.split(r"\s+and\s+", self.fields.get("author", ""))]
        shown = "; ".join(people[:6] + (["et al."] if len(people) > 6 else [])).replace("; others", "; et al.")
        where = self.fields.get("journal") or self.fields.get("booktitle") or self.fields.get("howpublished", "")
        number = self.fields.get("volume", "")
        pages = self.fields.get("pages", "").replace("--", DASH)
        place = where + (f" {number}" if number else "") + (f", {pages}" if pages else "")
        parts = (f"{shown} ({self.fields.get('year', '')})", self.fields.get("title", ""), place)
        return ". ".join(_plain(part) for part in parts if part) + "."

    @property
    def link(self) -> str:
        """Where it is found, or an empty string."""
        doi = self.fields.get("doi", "")
        return f"https://doi.org/{doi}" if doi else self.fields.get("url", "")


def _plain(text: str) -> str:
    return text.replace("{", "").replace("}", "").replace("--", DASH).strip()


@cache
def bibliography() -> dict[str, Reference]:
    """All references by key, read from `references.bib`."""
    found = {}
    for block in re.split(r"\n(?=@)", BIBLIOGRAPHY.read_text(encoding="utf-8")):
        head = re.match(r"@\w+\{([^,\s]+),", block)
        if head:
            fields = {name.lower(): value for name, value in re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", block, re.M)}
            found[head[1]] = Reference(head[1], fields, block.strip())
    return found


def cited(text: str) -> list[str]:
    """Citation keys in order of first appearance."""
    keys = [key for group in GROUP.findall(text) for key in KEY.findall(group)]
    return list(dict.fromkeys(keys))


def methods_text(results: UnitResults | Sequence[UnitResults]) -> str:
    """The methods section in Markdown with citation keys.

    Parameters
    ----------
    results : UnitResults or sequence of UnitResults
        Units that were processed alike share one text; otherwise each kind has its own.

    Returns
    -------
    str
        Markdown; references as `[@key]`, all of them in `references.bib`.
    """
    units = [results] if isinstance(results, UnitResults) else list(results)
    texts: dict[str, list[str]] = {}
    for unit in units:
        texts.setdefault("\n\n".join(_paragraphs(unit)), []).append(unit.unit.name)
    if len(texts) == 1:
        return next(iter(texts)) + "\n"
    return "\n\n".join(f"## {', '.join(names)}\n\n{text}" for text, names in texts.items()) + "\n"


def _paragraphs(results: UnitResults) -> list[str]:
    """Headings and paragraphs of one unit, in the order of processing."""
    count = len(results.unit.runs)
    intro = (
        f"Results were obtained with *dsiprep* {version('dsiprep')} [@dsiprep], which preprocesses "
        "diffusion MRI "
        "with any sampling of q-space and names its derivatives as QSIPrep does [@cieslak2021]."
    )
    series = f"The diffusion-weighted series ({count} run{'s' if count > 1 else ''}) was sampled as follows: "
    return [
        "# Methods",
        intro,
        "### Structural image",
        *_anatomy(results),
        "### Diffusion images",
        f"{series}{results.acquired.scheme.description}.",
        *_diffusion(results),
        "### Software",
        "Arrays are held by NumPy [@harris2020] and PyTorch [@paszke2019], hot loops are compiled by Numba "
        "[@lam2015], further algorithms come from SciPy [@virtanen2020], and files are read and written "
        "by NiBabel "
        "[@brett2024].",
    ]


def _named(methods: dict[str, str], told: str) -> list[str]:
    """The paragraph whose name occurs in what a result tells of its method."""
    return [text for name, text in methods.items() if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", told)][:1]


def _anatomy(results: UnitResults) -> list[str]:
    """Structural processing: what applies of bias, brain, tissue, ACPC and template."""
    found = results.anatomy
    methods = {**structural_average.METHODS, **anatomy.METHODS, **freesurfer.METHODS, **ants.METHODS}
    if found.modality == "none":
        return [methods["none"]] if "none" in methods else []
    normalised = found.acpc_to_template is not None
    settings, own = results.settings.anatomy, found.labels is None
    steps = {
        "several": len(found.orig_to_anat) > 1 and settings.reference == "first-lex",
        "unbiased": len(found.orig_to_anat) > 1 and settings.reference != "first-lex",
        "n4": settings.biascorrect == "n4",
        "brain": own and not settings.mask,
        "freesurfer": not own,
        "T1w": True,
        "tissue": own and found.tissue is not None,
        {"native": "normalize"}.get(settings.normalizer, settings.normalizer): normalised,
    }
    texts = [
        methods[name].replace("T1w", found.modality) for name, applies in steps.items() if applies and name in methods
    ]
    if normalised:
        texts.append(f"The template was {found.template} [@fonov2011], under its name in TemplateFlow [@ciric2022].")
    return texts


def _reading(results: UnitResults) -> list[str]:
    """How runs were put together, where there were several, and how the scheme was recognised."""
    several = len(results.unit.runs) > 1
    steps = {
        "scheme": results.acquired.scheme.kind in ("DSI", "CS-DSI"),
        "conform": several,
        "harmonize_b0": several and results.settings.acquisition.harmonize_b0,
    }
    return [acquisition.METHODS[name] for name, applies in steps.items() if applies]


def _merging(results: UnitResults) -> list[str]:
    """How volumes or series were made one, where any were."""
    merge = results.settings.resample.merge
    averaged = _named(resample.METHODS, merge) if results.preprocessed.sources else []
    return averaged + (_named(resample.METHODS, "concat") if results.unit.output else [])


def _diffusion(results: UnitResults) -> list[str]:
    """Processing of the diffusion series, stage by stage."""
    biascorrect = results.settings.denoise.biascorrect
    corrected = results.distortion
    models = list(dict.fromkeys(motion.model for motion in results.motions))
    registered = results.coregistration.metric
    return [
        *_reading(results),
        denoise.METHODS["none" if results.denoised.noise is None else results.settings.denoise.method],
        *(text for model in models for text in _named(motion.METHODS, model)),
        *(_named(motion.METHODS, "eddy") if any(moved.eddy is not None for moved in results.motions) else []),
        *(_named(motion.METHODS, "replace") if results.settings.motion.outliers == "replace" else []),
        *(_named(CORRECTIONS, corrected.method) if corrected else [results.distortion_reason]),
        *(_named(CORRECTIONS, "diffusion") if corrected and corrected.diffusion else []),
        *_named(coregister.METHODS, registered),
        *_named(resample.METHODS, "resample"),
        *_named(resample.METHODS, biascorrect),
        *_merging(results),
        *quality.METHODS.values(),
    ]


def _markup(text: str) -> str:
    """Inline Markdown (bold, italics, code) of escaped text as HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<!\*)\*(?!\*)([^*]+)\*", r"<em>\1</em>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _short(key: str) -> str:
    """Author and year; the key itself where the bibliography lacks it, so that a text is never lost."""
    return bibliography()[key].short if key in bibliography() else key


def _html_citation(match: re.Match[str]) -> str:
    links = [f'<a href="#ref-{key}">{html.escape(_short(key))}</a>' for key in KEY.findall(match[1])]
    return f"({'; '.join(links)})"


def methods_html(results: UnitResults | Sequence[UnitResults]) -> str:
    """The methods section as an HTML fragment: citations link to the list of references at its end."""
    text = methods_text(results)
    parts = []
    for block in text.strip().split("\n\n"):
        head = re.match(r"(#+) (.*)", block)
        if head and head[2] == "Methods":
            continue
        body = _markup(GROUP.sub(_html_citation, html.escape((head[2] if head else block).strip())))
        parts.append(f"<h4>{body}</h4>" if head else f"<p>{body}</p>")
    entries = []
    for entry in _references(text):
        line = html.escape(entry.line)
        if entry.link:
            line += f' <a href="{html.escape(entry.link)}">{html.escape(entry.link)}</a>'
        entries.append(f'<li id="ref-{entry.key}">{line}</li>')
    return "\n".join([*parts, "<h4>References</h4>", "<ol>", *entries, "</ol>"])


def _references(text: str) -> list[Reference]:
    """Entries of the bibliography that a text cites, by first author and year."""
    return sorted(
        (bibliography()[key] for key in cited(text) if key in bibliography()),
        key=lambda reference: reference.short.lower(),
    )


def _tex(text: str) -> str:
    """The methods section as LaTeX for natbib."""

    def cite(match: re.Match[str]) -> str:
        return "\\citep{" + ",".join(KEY.findall(match[1])) + "}"

    blocks = []
    for block in text.strip().split("\n\n"):
        head = re.match(r"(#+) (.*)", block)
        body = re.sub(r"([%&#_$])", r"\\\1", head[2] if head else block)
        body = re.sub(r"\*([^*]+)\*", r"\\emph{\1}", body)
        body = re.sub(r"`([^`]+)`", r"\\texttt{\1}", body)
        body = body.replace("²", "\\textsuperscript{2}").replace("\N{MULTIPLICATION SIGN}", "$\\times$")
        body = GROUP.sub(cite, body.replace("\\_", "_") if GROUP.search(body) and "_" in body else body)
        level = {1: "section", 2: "subsection"}.get(len(head[1]), "subsubsection") if head else ""
        blocks.append(f"\\{level}*{{{body}}}" if head else body)
    preamble = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{natbib}\n\\begin{document}"
    return "\n\n".join(
        [preamble, *blocks, "\\bibliographystyle{plainnat}\n\\bibliography{CITATION}\n\\end{document}\n"]
    )


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Methods (dsiprep)</title>
<meta name="color-scheme" content="light dark">
<style>body{{font:16px/1.55 system-ui,sans-serif;max-width:48rem;margin:2rem auto}}</style></head>
<body><h1>Methods</h1>
{body}
</body></html>
"""


def write_boilerplate(results: UnitResults | Sequence[UnitResults], out: Path) -> Path:
    """Write the methods text and its references to `out/logs/CITATION.{md,html,tex,bib}`.

    Parameters
    ----------
    results : UnitResults or sequence of UnitResults
    out : Path
        Root of the derivatives.

    Returns
    -------
    Path
        CITATION.md.
    """
    text = methods_text(results)
    entries = _references(text)
    lines = "\n".join(f"- {entry.line}{' ' + entry.link if entry.link else ''}" for entry in entries)
    files = {
        "bib": "\n\n".join(entry.text for entry in entries) + "\n",
        "tex": _tex(text),
        "html": PAGE.format(body=methods_html(results)),
        "md": f"{text}\n### References\n\n{lines}\n",
    }
    for kind, content in files.items():
        write_atomically(out / "logs" / f"CITATION.{kind}", content.encode("utf-8"))
    return out / "logs" / "CITATION.md"
