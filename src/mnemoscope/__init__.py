"""mnemoscope shows what image diffusion models have memorized.

    target = mnemoscope.load("demo")
    mnemoscope.check(target, "a prompt")

Public names are loaded when first used, so that reading a run or printing help never imports torch.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = (
    False  # as typing says; importing that takes longer than all of this, and Ctrl-C in it ends in a traceback
)

__version__ = "0.1.0"

_HOME = {
    "AuditConfig": "audit.config",
    "Calibration": "detect.calibrate",
    "Condition": "models.base",
    "Explainer": "explain.tokens",
    "Explanation": "explain.tokens",
    "Gaussian": "models.gaussian",
    "Magnitude": "detect.magnitude",
    "Mixture": "models.mixture",
    "MnemoscopeError": "errors",
    "Pixels": "similarity.pixels",
    "ReferenceSet": "similarity.reference",
    "Run": "records.store",
    "Step": "types",
    "Target": "models.base",
    "World": "demo.world",
    "allow_program": "programs",
    "calibrate": "audit.run",
    "check": "audit.check",
    "denoise": "models.sampling",
    "explain_prompt": "explain.tokens",
    "guard": "serve.guard",
    "load": "models.load",
    "magnitude": "detect.magnitude",
    "null_output": "models.sampling",
    "overlay": "explain.overlay",
    "regions": "explain.regions",
    "run_audit": "audit.run:audit",
    "suggest": "explain.edits",
    "summarize": "report.summary",
    "watch": "models.watch",
    "write_report": "report.html",
}

if TYPE_CHECKING:
    from typing import Any

    from .audit.check import check as check
    from .audit.config import AuditConfig as AuditConfig
    from .audit.run import audit as run_audit
    from .audit.run import calibrate as calibrate
    from .demo.world import World as World
    from .detect.calibrate import Calibration as Calibration
    from .detect.magnitude import Magnitude as Magnitude
    from .detect.magnitude import magnitude as magnitude
    from .errors import MnemoscopeError as MnemoscopeError
    from .explain.edits import suggest as suggest
    from .explain.overlay import overlay as overlay
    from .explain.regions import regions as regions
    from .explain.tokens import Explainer as Explainer
    from .explain.tokens import Explanation as Explanation
    from .explain.tokens import explain_prompt as explain_prompt
    from .models.base import Condition as Condition
    from .models.base import Target as Target
    from .models.gaussian import Gaussian as Gaussian
    from .models.load import load as load
    from .models.mixture import Mixture as Mixture
    from .models.sampling import denoise as denoise
    from .models.sampling import null_output as null_output
    from .models.watch import watch as watch
    from .programs import allow_program as allow_program
    from .records.store import Run as Run
    from .report.html import write_report as write_report
    from .report.summary import summarize as summarize
    from .serve.guard import guard as guard
    from .similarity.pixels import Pixels as Pixels
    from .similarity.reference import ReferenceSet as ReferenceSet
    from .types import Step as Step

__all__ = [
    "AuditConfig",
    "Calibration",
    "Condition",
    "Explainer",
    "Explanation",
    "Gaussian",
    "Magnitude",
    "Mixture",
    "MnemoscopeError",
    "Pixels",
    "ReferenceSet",
    "Run",
    "Step",
    "Target",
    "World",
    "__version__",
    "allow_program",
    "calibrate",
    "check",
    "denoise",
    "explain_prompt",
    "guard",
    "load",
    "magnitude",
    "null_output",
    "overlay",
    "regions",
    "run_audit",
    "suggest",
    "summarize",
    "watch",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mnemoscope' has no attribute {name!r}; it has: {', '.join(__all__)}.")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f".{module}", __name__), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
