"""The methods section and its references, assembled from the processing steps that were applied.

Each stage keeps its methods text next to its algorithm (`METHODS`). This module selects and orders the paragraphs
that apply, and resolves citation keys (`[@key]`) in `references.bib`.
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
from dsiprep.report.slice_motion_part import moved_within
from dsiprep.stages import (
    acquisition,
    anatomy,
    coregister,
    denoise,
    distortion,
    fieldmap,
    fieldmapless,
    gradient_check,
    gradient_nonlinearity,
    lattice,
    motion,
    qspace_quality,
    quality,
    resample,
    slice_motion,
    structural_average,
    unringing,
)

BIBLIOGRAPHY = Path(__file__).with_name("references.bib")
DISTORTION_METHODS = {**distortion.METHODS, **fieldmap.METHODS, **fieldmapless.METHODS, **tortoise.METHODS}
EN_DASH = "\N{EN DASH}"
CITATION_KEY = re.compile(r"@([A-Za-z][\w-]*)")
CITATION_GROUP = re.compile(r"\[(@[A-Za-z][\w-]*(?:\s*;\s*@[A-Za-z][\w-]*)*)\]")


@dataclass(frozen=True)
class Reference:
    """One entry of the bibliography: citation key, fields by lower-case name, and BibTeX source."""

    key: str
    fields: dict[str, str]
    text: str

    @property
    def authors(self) -> list[str]:
        """Family names of the authors."""
        return [_strip_tex(name.split(",")[0]) for name in self._author_names]

    @property
    def short(self) -> str:
        """Author-year citation: "Cieslak et al. 2021"."""
        names = self.authors
        authors = (
            names[0] if len(names) == 1 else f"{names[0]} and {names[1]}" if len(names) == 2 else f"{names[0]} et al."
        )
        return f"{authors} {self.fields.get('year', '')}".strip()

    @property
    def formatted(self) -> str:
        """Entry of a reference list, without its link: authors (year). Title. Journal volume, pages."""
        names = [_strip_tex(name) for name in self._author_names]
        authors = "; ".join(names[:6] + (["et al."] if len(names) > 6 else [])).replace("; others", "; et al.")
        places = ("journal", "booktitle", "howpublished", "publisher")
        source = next((self.fields[place] for place in places if place in self.fields), "")
        volume = self.fields.get("volume", "")
        pages = self.fields.get("pages", "").replace("--", EN_DASH)
        source += (f" {volume}" if volume else "") + (f", {pages}" if pages else "")
        parts = (f"{authors} ({self.fields.get('year', '')})", self.fields.get("title", ""), source)
        return ". ".join(_strip_tex(part) for part in parts if part) + "."

    @property
    def link(self) -> str:
        """DOI link, otherwise the URL, otherwise an empty string."""
        doi = self.fields.get("doi", "")
        return f"https://doi.org/{doi}" if doi else self.fields.get("url", "")

    @property
    def _author_names(self) -> list[str]:
        return re.split(r"\s+and\s+", self.fields.get("author", ""))


def _strip_tex(text: str) -> str:
    """Text without BibTeX braces, with en dashes."""
    return text.replace("{", "").replace("}", "").replace("--", EN_DASH).strip()


@cache
def bibliography() -> dict[str, Reference]:
    """All references by key, read from `references.bib`."""
    references = {}
    for block in re.split(r"\n(?=@)", BIBLIOGRAPHY.read_text(encoding="utf-8")):
        head = re.match(r"@\w+\{([^,\s]+),", block)
        if head:
            fields = {name.lower(): value for name, value in re.findall(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", block, re.M)}
            references[head[1]] = Reference(head[1], fields, block.strip())
    return references


def citation_keys(text: str) -> list[str]:
    """Citation keys in order of first appearance."""
    keys = [key for group in CITATION_GROUP.findall(text) for key in CITATION_KEY.findall(group)]
    return list(dict.fromkeys(keys))


def methods_text(results: UnitResults | Sequence[UnitResults]) -> str:
    """The methods section in Markdown with citation keys.

    Parameters
    ----------
    results : UnitResults or sequence of UnitResults
        Units with identical processing share one text; otherwise each distinct text has its own heading.

    Returns
    -------
    str
        Markdown with citations as `[@key]`, where every key is defined in `references.bib`.
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
    return [
        "# Methods",
        f"Diffusion MRI data were preprocessed with *dsiprep* {version('dsiprep')} [@dsiprep], which supports any "
        "q-space sampling scheme and follows the naming conventions of QSIPrep [@cieslak2021] for its derivatives.",
        "### Anatomical preprocessing",
        *_anatomical_paragraphs(results),
        "### Diffusion preprocessing",
        f"The diffusion series consisted of {count} run{'s' if count > 1 else ''} with the following sampling scheme: "
        f"{results.acquired.scheme.description}.",
        *_diffusion_paragraphs(results),
        "### Software",
        "The software is based on NumPy [@harris2020], SciPy [@virtanen2020] and PyTorch [@paszke2019] for numerical "
        "computation, on Numba [@lam2015] for just-in-time compilation of performance-critical loops, and on NiBabel "
        "[@brett2024] for image input and output.",
    ]


def _matching(methods: dict[str, str], description: str) -> list[str]:
    """The first paragraph whose name occurs as a word in a description of the method, as a list of at most one."""
    return [text for name, text in methods.items() if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", description)][
        :1
    ]


def _anatomical_paragraphs(results: UnitResults) -> list[str]:
    """Anatomical processing: averaging, bias correction, brain mask, ACPC alignment, tissues and normalisation."""
    result = results.anatomy
    methods = {**structural_average.METHODS, **anatomy.METHODS, **freesurfer.METHODS, **ants.METHODS}
    if result.modality == "none":
        return [methods["none"]] if "none" in methods else []
    normalised = result.acpc_to_template is not None
    settings, native = results.settings.anatomy, result.labels is None
    steps = {
        "several": len(result.orig_to_anat) > 1 and settings.reference == "first-lex",
        "unbiased": len(result.orig_to_anat) > 1 and settings.reference != "first-lex",
        "n4": settings.biascorrect == "n4",
        "brain": native and not settings.mask,
        "freesurfer": not native,
        "T1w": True,
        "tissue": native and result.tissue is not None,
        {"native": "normalize"}.get(settings.normalizer, settings.normalizer): normalised,
    }
    texts = [
        methods[name].replace("T1w", result.modality) for name, applies in steps.items() if applies and name in methods
    ]
    if normalised:
        source = f" (source: {result.template_origin})" if result.template_origin else ""
        name = f"{result.template} [@fonov2011]{source}"
        texts.append(f"The template was {name}, identified by its TemplateFlow name [@ciric2022].")
    return texts


def _acquisition_paragraphs(results: UnitResults) -> list[str]:
    """Recognition of the sampling scheme and, with several runs, their concatenation."""
    several_runs, drift = len(results.unit.runs) > 1, results.acquired.drift
    steps = {
        "scheme": results.acquired.scheme.kind in ("DSI", "CS-DSI"),
        "conform": several_runs,
        "drift": drift is not None and bool((drift.gains != 1).any()),
        "harmonize_b0": several_runs and results.settings.acquisition.harmonize_b0,
        "references": bool(results.distortion) and any(blip.grid for blip in results.acquired.blips),
    }
    return [acquisition.METHODS[name] for name, applies in steps.items() if applies]


def _merge_paragraphs(results: UnitResults) -> list[str]:
    """Combination of volumes with opposite phase encoding, and concatenation of series, where applied."""
    merge = results.settings.resample.merge
    combined = _matching(resample.METHODS, merge) if results.preprocessed.sources else []
    return combined + (_matching(resample.METHODS, "concat") if results.unit.output else [])


def _diffusion_paragraphs(results: UnitResults) -> list[str]:
    """Processing of the diffusion series, stage by stage."""
    biascorrect = results.settings.denoise.biascorrect
    correction = results.distortion
    models = list(dict.fromkeys(result.model for result in results.motions))
    metric = results.coregistration.metric
    return [
        *_acquisition_paragraphs(results),
        *([gradient_check.METHODS["checked"]] if results.gradients and results.gradients.lengths else []),
        *([gradient_check.METHODS["corrected"]] if results.gradients and results.gradients.corrected else []),
        denoise.METHODS["none" if results.denoised.noise is None else results.settings.denoise.method],
        *([] if results.denoised.floor == "none" else [denoise.METHODS[results.denoised.floor]]),
        *([denoise.METHODS["complex"]] if results.denoised.dwi.signed else []),
        *(unringing.METHODS[method] for method in dict.fromkeys(results.unringed.methods)),
        *_nonlinearity_paragraphs(results),
        *(text for model in models for text in _matching(motion.METHODS, model)),
        *(_matching(motion.METHODS, "eddy") if any(result.eddy is not None for result in results.motions) else []),
        *(slice_motion.METHODS.values() if any(map(moved_within, results.motions)) else ()),
        *(_matching(motion.METHODS, "replace") if results.settings.motion.outliers == "replace" else []),
        *(_matching(DISTORTION_METHODS, correction.method) if correction else [results.distortion_reason]),
        *(_matching(DISTORTION_METHODS, "diffusion") if correction and correction.diffusion else []),
        *_matching(coregister.METHODS, metric),
        *_matching(resample.METHODS, "resample"),
        *_matching(resample.METHODS, biascorrect),
        *_merge_paragraphs(results),
        *(lattice.METHODS.values() if results.lattice else ()),
        *quality.METHODS.values(),
        *(qspace_quality.METHODS.values() if results.quality.qspace else ()),
    ]


def _nonlinearity_paragraphs(results: UnitResults) -> list[str]:
    if results.nonlinearity is None:
        return []
    done, methods = results.nonlinearity.corrections.series, gradient_nonlinearity.METHODS
    warp = methods["done"] if done == "3d" else methods["warp"].format(left=gradient_nonlinearity.LEFT[done])
    return [warp + methods["gradients"]]


def _inline_html(text: str) -> str:
    """Escaped text with inline Markdown (bold, italics, code) converted to HTML."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<!\*)\*(?!\*)([^*]+)\*", r"<em>\1</em>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _author_year(key: str) -> str:
    """Author-year citation, or the key itself if the bibliography lacks it."""
    return bibliography()[key].short if key in bibliography() else key


def _linked_citation(match: re.Match[str]) -> str:
    """A citation group in parentheses, each citation linked to its entry in the reference list."""
    links = [f'<a href="#ref-{key}">{html.escape(_author_year(key))}</a>' for key in CITATION_KEY.findall(match[1])]
    return f"({'; '.join(links)})"


def methods_html(results: UnitResults | Sequence[UnitResults]) -> str:
    """The methods section as an HTML fragment with a reference list that its citations link to."""
    text = methods_text(results)
    parts = []
    for block in text.strip().split("\n\n"):
        head = re.match(r"(#+) (.*)", block)
        if head and head[2] == "Methods":
            continue
        body = _inline_html(CITATION_GROUP.sub(_linked_citation, html.escape((head[2] if head else block).strip())))
        parts.append(f"<h4>{body}</h4>" if head else f"<p>{body}</p>")
    entries = []
    for reference in _cited_references(text):
        line = html.escape(reference.formatted)
        if reference.link:
            line += f' <a href="{html.escape(reference.link)}">{html.escape(reference.link)}</a>'
        entries.append(f'<li id="ref-{reference.key}">{line}</li>')
    return "\n".join([*parts, "<h4>References</h4>", "<ol>", *entries, "</ol>"])


def _cited_references(text: str) -> list[Reference]:
    """References cited in a text, sorted by first author and year."""
    return sorted(
        (bibliography()[key] for key in citation_keys(text) if key in bibliography()),
        key=lambda reference: reference.short.lower(),
    )


def _latex(text: str) -> str:
    """The methods section as a LaTeX document that uses natbib."""

    def cite(match: re.Match[str]) -> str:
        return "\\citep{" + ",".join(CITATION_KEY.findall(match[1])) + "}"

    blocks = []
    for block in text.strip().split("\n\n"):
        head = re.match(r"(#+) (.*)", block)
        body = re.sub(r"([%&#_$])", r"\\\1", head[2] if head else block)
        body = re.sub(r"\*([^*]+)\*", r"\\emph{\1}", body)
        body = re.sub(r"`([^`]+)`", r"\\texttt{\1}", body)
        body = body.replace("²", "\\textsuperscript{2}").replace("\N{MULTIPLICATION SIGN}", "$\\times$")
        body = CITATION_GROUP.sub(
            cite, body.replace("\\_", "_") if CITATION_GROUP.search(body) and "_" in body else body
        )
        command = {1: "section", 2: "subsection"}.get(len(head[1]), "subsubsection") if head else ""
        blocks.append(f"\\{command}*{{{body}}}" if head else body)
    preamble = "\\documentclass{article}\n\\usepackage[utf8]{inputenc}\n\\usepackage{natbib}\n\\begin{document}"
    return "\n\n".join(
        [preamble, *blocks, "\\bibliographystyle{plainnat}\n\\bibliography{CITATION}\n\\end{document}\n"]
    )


HTML_PAGE = """<!DOCTYPE html>
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
    references = _cited_references(text)
    lines = "\n".join(f"- {entry.formatted}{' ' + entry.link if entry.link else ''}" for entry in references)
    files = {
        "bib": "\n\n".join(entry.text for entry in references) + "\n",
        "tex": _latex(text),
        "html": HTML_PAGE.format(body=methods_html(results)),
        "md": f"{text}\n### References\n\n{lines}\n",
    }
    for suffix, content in files.items():
        write_atomically(out / "logs" / f"CITATION.{suffix}", content.encode("utf-8"))
    return out / "logs" / "CITATION.md"
