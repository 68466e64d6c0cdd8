"""How a studio is started, and the refusal of settings that would be unsafe."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from dittools.errors import InputError

LOCAL_NAMES = ("localhost",)


@dataclass(frozen=True)
class StudioSettings:
    """What `dittools studio` and `app.py` take.

    Attributes:
        runs: folder of the history; the only folder whose files are served.
        host: address to listen on.
        port: to listen on; 0 takes a free one.
        share: whether to open a public tunnel.
        auth: "user:password", needed as soon as others can reach the page.
        device: "auto" takes the first GPU when there is one.
        dtype: as for `load`.
    """

    runs: Path = Path("out/studio")
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what would open the page to others without a password."""
        if self.auth is not None and self.login() is None:
            raise InputError(
                "--auth is not usable", expected="user:password", got="no user or no password"
            )
        if (self.share or not is_local(self.host)) and self.auth is None:
            wanted = "--share" if self.share else f"--host {self.host}"
            raise InputError(
                f"{wanted} lets others reach the studio",
                expected="a login",
                remedy="--auth user:password, or the default host 127.0.0.1",
            )
        if not 0 <= self.port < 65536:
            raise InputError("port is not usable", expected="0 to 65535", got=str(self.port))

    def login(self) -> tuple[str, str] | None:
        """Return user and password; None without a login."""
        user, _, password = (self.auth or "").partition(":")
        return (user, password) if user and password else None


def is_local(host: str) -> bool:
    """Return whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES
