"""The plugin's file on the host."""

from pathlib import Path

from installer.host import files
from installer.host.chain import PLUGIN
from installer.host.files import FileRefused, Found

# a runtime must be able to execute the file; it belongs to root, like everything in that directory
_MODE = 0o755


def drop(shim: Path, directory: Path) -> bool:
    """Copy the plugin of this image to the host's directory; False if it was there already. Raises FileRefused."""
    wanted = Found(_content(shim), _MODE, 0, 0)
    target = directory / PLUGIN
    try:
        found = files.read(target)
    except FileRefused:
        found = None  # a link or a device: replaced, not followed
    if found == wanted:
        return False
    try:
        files.replace(target, wanted)
    except FileRefused as error:
        raise FileRefused(f"{error}; check that MOUNTED_CNI_BIN_DIR is this platform's directory") from error
    return True


def fault_of_plugin(shim: Path, directory: Path) -> str:
    """What is wrong with the plugin in the host's directory; empty if nothing is. Raises FileRefused."""
    found = files.read(directory / PLUGIN)
    if found is None:
        return "missing"
    if found.content != _content(shim):
        return "of another version"
    return "" if found == Found(found.content, _MODE, 0, 0) else "mode or owner changed"


def take_away(directory: Path) -> bool:
    """Remove the plugin; False if it was not there. Raises FileRefused."""
    return files.remove(directory / PLUGIN)


def _content(shim: Path) -> bytes:
    found = files.read(shim)
    if found is None:
        raise FileRefused(f"{shim}: no such plugin; build it, or give its path with --shim")
    return found.content
