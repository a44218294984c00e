"""The directory that keeps bytecode: what is kept is found again, and what is otherwise is not believed."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from bpf import kept
from bpf.kept import NoDirectory, NotBelieved, find, keep

# both ways to use a directory
LOOKS: tuple[Callable[[Path], object], ...] = (lambda where: find(where, "one"), lambda where: keep(where, "one", b""))


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """A directory in which `one` is kept."""
    keep(tmp_path / "run" / "bytecode", "one", b"content")
    return tmp_path / "run" / "bytecode"


def test_what_is_kept_is_found_by_its_name_alone(where: Path) -> None:
    assert find(where, "one") == b"content"
    assert find(where, "two") is None
    assert find(where / "nowhere", "one") is None


def test_only_its_owner_may_read_or_write_what_is_kept(where: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (where.parent, where)}
    assert modes == {0o700}
    assert stat.S_IMODE((where / "one").stat().st_mode) == 0o600


def test_what_is_kept_again_takes_the_place_of_what_was_there(where: Path) -> None:
    keep(where, "one", b"other")
    assert find(where, "one") == b"other"
    assert [path.name for path in where.iterdir()] == ["one"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"tent", b"text"))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rename_another(path: Path) -> None:
    keep(path.parent, "two", b"content of two")
    (path.parent / "two").rename(path)


@pytest.mark.parametrize("damage", [cut, empty, alter, lengthen, rename_another])
def test_a_damaged_file_is_not_believed(where: Path, damage: Callable[[Path], None]) -> None:
    damage(where / "one")
    with pytest.raises(NotBelieved, match=rf"^{where}/one is damaged$"):
        find(where, "one")


def test_a_file_or_directory_that_others_may_write_to_is_not_believed(where: Path) -> None:
    (where / "one").chmod(0o620)
    with pytest.raises(NotBelieved, match=rf"^{where}/one has mode 0620; nobody but root may write to it$"):
        find(where, "one")
    where.chmod(0o702)
    for look in LOOKS:
        with pytest.raises(NotBelieved, match=rf"^{where} has mode 0702; nobody but root may write to it$"):
            look(where)


def test_what_belongs_to_another_user_is_not_believed(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = os.fstat, os.stat_result
    foreign = 4711

    def fstat(fd: int) -> os.stat_result:
        fields = list(real(fd))
        fields[stat.ST_UID] = foreign
        return found(fields)

    monkeypatch.setattr(os, "fstat", fstat)
    for look in LOOKS:
        with pytest.raises(NotBelieved, match=rf"^{where} belongs to uid {foreign}; it must belong to root$"):
            look(where)


def test_a_link_is_not_followed(where: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(where)
    with pytest.raises(NotBelieved, match=rf"^{link}: it is a symbolic link$"):
        find(link, "one")
    (where / "two").symlink_to(where / "one")
    with pytest.raises(NotBelieved, match=rf"^{where}/two: it is a symbolic link$"):
        find(where, "two")


def test_what_is_no_file_is_not_believed_and_not_waited_for(where: Path) -> None:
    os.mkfifo(where / "fifo", 0o600)
    (where / "directory").mkdir(mode=0o700)
    for name in ("fifo", "directory"):
        with pytest.raises(NotBelieved, match=rf"^{where}/{name} is not a file of less than 8 MiB$"):
            find(where, name)
    with pytest.raises(NotBelieved, match=rf"^{where}/one: Not a directory$"):
        find(where / "one", "one")


def test_an_endless_file_is_not_read(where: Path) -> None:
    os.truncate(where / "one", 1 << 40)
    with pytest.raises(NotBelieved, match="is not a file of less than 8 MiB"):
        find(where, "one")


def test_files_that_were_not_used_for_longest_go_first(where: Path) -> None:
    for number in range(kept._MOST_FILES + 4):
        keep(where, f"other{number}", b"")
        os.utime(where / f"other{number}", (number, number))
        assert find(where, "one") == b"content"
    newest = range(5, kept._MOST_FILES + 4)
    assert {path.name for path in where.iterdir()} == {"one", *(f"other{number}" for number in newest)}


def test_a_write_that_fails_leaves_what_was_there(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        keep(where, "one", b"other")
    assert [path.name for path in where.iterdir()] == ["one"]
    assert find(where, "one") == b"content"


def test_the_environment_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kept.VARIABLE, "/somewhere/else")
    assert kept.directory() == Path("/somewhere/else")
    monkeypatch.setenv(kept.VARIABLE, "")
    assert kept.directory() == Path("/run/sidestep/bytecode")
    monkeypatch.setenv(kept.VARIABLE, "build/bytecode")
    words = (
        f'^{kept.VARIABLE}: "build/bytecode" is not an absolute path; give one, or nothing for /run/sidestep/bytecode$'
    )
    with pytest.raises(NoDirectory, match=words):
        kept.directory()
