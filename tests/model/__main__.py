"""`python -m tests.model` walks everything and prints a table; `--quick` leaves out what takes a minute."""

import sys

from tests.model.explorer import explore
from tests.model.scopes import LARGE, SCOPES
from tests.model.variants import VARIANTS
from tests.model.world import World


def main() -> int:
    scopes = SCOPES if "--quick" in sys.argv[1:] else {**SCOPES, **LARGE}
    failed = 0
    print(f"{'world':<44}{'changes':>8}{'states':>10}{'transitions':>13}{'seconds':>9}  verdict")
    for name, scope in scopes.items():
        report = explore(World(scope))
        failed += bool(report.trace)
        verdict = "VIOLATED" if report.trace else "holds, nothing stuck"
        print(
            f"{name:<44}{scope.changes:>8}{report.states:>10}{report.transitions:>13}{report.seconds:>9.1f}  {verdict}",
            *(f"    {line}" for line in report.trace),
            sep="\n",
            flush=True,
        )
    print(f"\n{'known-bad rules':<44}{'steps to the fault':>18}{'states':>10}  complaint")
    for name, variant in VARIANTS.items():
        report = explore(World(variant.scope, variant.rules()))
        failed += not any(variant.complaint in line for line in report.trace)
        complaint = next((line for line in report.trace if variant.complaint in line), "!! NOT FOUND")
        print(f"{name:<44}{report.steps:>18}{report.states:>10}  {complaint.removeprefix('!! ')}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
