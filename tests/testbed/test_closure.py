from __future__ import annotations

from testbed.closure import order_dependencies, parse_depends

LISTING = """\
server
  PreDepends: preinst
  Depends: tools
 |Depends: first
  Depends: second
  Depends: <virtual>
    provider
    other-provider
  Depends: <tools:any>
    tools
tools
  Depends: libc6
libc6
  Depends: libgcc-s1
libgcc-s1
  Depends: libc6
"""


def test_of_alternatives_and_providers_the_first_counts() -> None:
    assert parse_depends(LISTING) == {
        "server": ("preinst", "tools", "first", "provider"),
        "tools": ("libc6",),
        "libc6": ("libgcc-s1",),
        "libgcc-s1": ("libc6",),
    }


def test_dependencies_come_first_with_all_that_they_need() -> None:
    ordered = order_dependencies(["server"], {"server": ["tools"], "tools": ["libssl3", "libc6"]})
    assert ordered == {
        "libssl3": (),
        "libc6": (),
        "tools": ("libssl3", "libc6"),
        "server": ("tools", "libssl3", "libc6"),
    }
    assert list(ordered)[-1] == "server"


def test_the_cycle_of_the_c_library_is_cut_there() -> None:
    ordered = order_dependencies(["libgcc-s1"], parse_depends(LISTING))
    assert ordered == {"libc6": (), "libgcc-s1": ("libc6",)}


def test_what_only_an_installation_needs_is_left_out_unless_asked_for() -> None:
    needs = {"bash": ["debianutils"], "debianutils": []}
    assert order_dependencies(["bash"], needs) == {"bash": ()}
    assert order_dependencies(["debianutils"], needs) == {"debianutils": ()}
