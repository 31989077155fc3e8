"""Methods of the study, as overrides of study.yaml, and their titles in tables."""

REFERENCE = "aropd_0.8"
SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
"""Values of lambda."""

MAIN: dict[str, list[str]] = {
    "sft": ["objective.name=sft"],
    "full_opd": ["objective.residual_scale=1", "objective.residual_clip=null"],
    "partial_opd": ["objective.residual_scale=0"],
    **{f"aropd_{scale}": [f"objective.residual_scale={scale}"] for scale in SCALES},
}
"""The paper's comparison. Settings that are not overridden are those of REFERENCE."""

ABLATIONS: dict[str, list[str]] = {
    "clip_1": ["objective.residual_clip=1"],
    "clip_none": ["objective.residual_clip=null"],
    "rho_0.25": ["views.partial_ratio=0.25"],
    "rho_0.75": ["views.partial_ratio=0.75"],
    "kl_student_target": ["objective.divergence=kl_student_target"],
    "jsd": ["objective.divergence=jsd"],
    "teacher_frozen": ["teacher.kind=frozen"],
    "teacher_live": ["teacher.kind=live"],
}
"""Ablations: each changes one setting of REFERENCE."""

METHODS = MAIN | ABLATIONS

TITLES = {
    "base": "base",
    "sft": "SFT",
    "full_opd": "Full OPD",
    "partial_opd": "Partial OPD",
    **{f"aropd_{scale}": f"AR-OPD, λ = {scale}" for scale in SCALES},
    "clip_1": "c = 1",
    "clip_none": "no clip",
    "rho_0.25": "ρ = 0.25",
    "rho_0.75": "ρ = 0.75",
    "kl_student_target": "KL(student ‖ target)",
    "jsd": "JSD",
    "teacher_frozen": "frozen teacher",
    "teacher_live": "live teacher",
}
