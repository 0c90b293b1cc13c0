"""Options and values of QSIPrep that dsiprep refuses, each with a sentence on what to do instead."""

from __future__ import annotations

# Options that users of QSIPrep know and dsiprep has not, and what to do without them.
NOT_HERE = {
    "--bids-database-dir": "the dataset is indexed in a second or two without a database; leave it out",
    "--low-mem": "series are memory-mapped anyway; leave it out",
    "--gpu": "one option serves all stages: use --device cuda",
    "--infant": "infant templates are not built yet",
    "--anatomical-template": "other templates are not built yet; MNI152NLin2009cAsym is used where TemplateFlow has it",
    "--subject-anatomical-reference": "images of the first session serve all sessions of a subject (first-lex)",
    "--sdc-fieldmapless-method": "fieldmap-less correction is not built yet",
    "--sdc-anat-reference": "fieldmap-less correction is not built yet",
    "--use-syn-sdc": "fieldmap-less correction is not built yet",
    "--force-syn": "fieldmap-less correction is not built yet",
    "--dwiref-definition": "the dwiref is the unbiased b=0 template",
    "--report-output-level": "reports are written to the root of the output folder",
    "--eddy-config": "there is no eddy in here; see --hmc-method",
    "--recon-spec": "reconstruction is QSIRecon's work; give it this output folder",
}

# Values that upstream takes for options that dsiprep has, and why they are refused.
SHELLS_ONLY = (
    "eddy and TOPUP suit shelled data; DSI takes 3dSHORE and DRBUDDI: use --hmc-method shoreline --sdc-method drbuddi"
)
NOT_BUILT = {
    ("--hmc-method", "eddy"): "dsiprep has no FSL eddy: use --hmc-method shoreline, which serves shells too",
    (
        "--hmc-method",
        "tortoise",
    ): "TORTOISE serves distortion (--sdc-engine tortoise) alone: use --hmc-method shoreline",
    ("--hmc-model", "eddy"): "dsiprep has no FSL eddy: use --hmc-model 3dSHORE, which serves shells too",
    ("--hmc-model", "tortoise"): "TORTOISE serves distortion (--sdc-engine tortoise) alone: use --hmc-model 3dSHORE",
    ("--sdc-method", "topup"): "dsiprep has no TOPUP: use --sdc-method drbuddi, which serves shells too",
    ("--sdc-method", "topup+drbuddi"): "dsiprep has no TOPUP: use --sdc-method drbuddi",
    ("--denoise-method", "patch2self"): "Patch2Self is not built yet: use --denoise-method dwidenoise",
    ("--denoise-method", "dwidenoise2"): "dwidenoise2 is not built yet: use --denoise-method dwidenoise",
    ("--denoise-method", "svht"): "svht is not built yet: use --denoise-method dwidenoise",
    ("--unringing-method", "mrdegibbs"): "unringing is not built yet: use --unringing-method none",
    ("--unringing-method", "rpg"): "unringing is not built yet: use --unringing-method none",
    ("--unringing-method", "svht"): "unringing is not built yet: use --unringing-method none",
    ("--dwi-biascorrect", "auto"): "use --dwi-biascorrect n4 or none",
    ("--anat-biascorrect", "auto"): "use --anat-biascorrect n4 or none",
    ("--anat-modality", "T2w"): "T2w as the structural image is not built yet: use T1w or none",
    ("--distortion-group-merge", "average"): "averaging is not built yet: use none",
    ("--distortion-group-merge", "concat"): "joining outputs after their correction is not built yet: use none; "
    "blip-up and blip-down series that correct each other are one output anyway",
    ("--b1-biascorrect-stage", "legacy"): "use --b1-biascorrect-stage final or none",
}
SHELL_TOOLS = {("--hmc-method", "eddy"), ("--hmc-model", "eddy"), ("--sdc-method", "topup"),
               ("--sdc-method", "topup+drbuddi")}  # fmt: skip
