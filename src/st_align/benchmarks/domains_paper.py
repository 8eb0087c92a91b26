"""What the paper prints in its Table 1: ARI, mean and standard deviation over five runs.

Its own data, splits and runs; shown beside ours, never mixed with them.
"""

from __future__ import annotations

from collections.abc import Iterable

from st_align.benchmarks.audit import same_section

SLICES = ("151507", "151508", "151509", "151669", "151670", "151673")

_TABLE = """
CTransPath     .059±.030 .070±.036 .082±.034 .003±.007 .048±.006 .227±.013
UNI            .106±.044 .107±.046 .165±.060 .002±.005 .064±.029 .210±.027
Prov-GigaPath  .105±.021 .095±.030 .154±.067 .031±.039 .088±.006 .193±.018
Hibou          .067±.033 .061±.034 .075±.040 .013±.029 .086±.003 .220±.010
CONCH          .102±.022 .162±.039 .193±.064 .005±.009 .084±.005 .224±.024
Scanpy         .218±.031 .225±.018 .390±.026 .288±.202 .233±.164 .229±.027
scFoundation   .206±.021 .233±.021 .387±.027 .285±.061 .259±.060 .199±.031
scGPT          .248±.021 .259±.011 .328±.034 .212±.145 .287±.038 .235±.031
CLIP           .298±.031 .317±.021 .375±.024 .114±.031 .228±.061 .206±.013
PLIP           .271±.040 .301±.008 .421±.018 .092±.051 .179±.036 .227±.012
ST-Align       .310±.016 .332±.035 .470±.037 .296±.100 .352±.067 .278±.014
"""

PRINTED: dict[str, dict[str, str]] = {
    name: dict(zip(SLICES, values, strict=True))
    for name, *values in (line.split() for line in _TABLE.strip().splitlines())
}
"""Method -> slice -> what is printed."""

_ROW_OF = {
    "Scanpy": "Scanpy-style PCA",
    "CLIP": "CLIP, trained elsewhere",
    "PLIP": "PLIP, trained elsewhere",
}


def printed_columns(slides: Iterable[str], models: Iterable[str]) -> dict[str, dict[str, str]]:
    """A column for each slide that the paper's table has: row of ours -> what the paper prints.

    Its ST-Align stands beside each of `models`. CLIP and PLIP stand at the rows trained elsewhere;
    whether the paper trained them so, it does not say.
    """
    columns: dict[str, dict[str, str]] = {}
    for slide in slides:
        for slice_ in SLICES:
            if same_section(slice_, slide):
                shown = {_ROW_OF.get(name, name): v[slice_] for name, v in PRINTED.items()}
                ours = shown.pop("ST-Align")
                columns[f"paper, {slice_}"] = shown | dict.fromkeys(models, ours)
    return columns
