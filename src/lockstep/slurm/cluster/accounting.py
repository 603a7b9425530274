"""Accounting of a cluster: MariaDB and slurmdbd in its folder, and the account of its user."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from lockstep.slurm.cluster.conf import ClusterError, host_is_loopback, search_path, user_name

ACCOUNT = "lockstep"
"""The account that the user of the cluster charges by default."""

_READY_SECONDS = 30.0

_SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munged/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
LogFile={folder}/slurmdbd/log
PidFile={folder}/slurmdbd/pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
"""

_ACCOUNTS = """\
Cluster - '{cluster}'
Parent - 'root'
Account - '{account}':Description='{account}':Organization='{account}'
Parent - '{account}'
User - '{user}':AdminLevel='Administrator':DefaultAccount='{account}'
"""

_DATABASE_OPTIONS = (
    # No password: only the socket in the private folder of the cluster leads to it.
    *("--skip-networking", "--skip-grant-tables"),
    # Small and fast. A kill loses no committed data; a crash of the machine may, but it ends the cluster anyway.
    *("--innodb-buffer-pool-size=16M", "--innodb-log-file-size=4M", "--innodb-temp-data-file-path=ibtmp1:4M:autoextend"),
    *("--innodb-flush-method=nosync", "--innodb-flush-log-at-trx-commit=2", "--innodb-doublewrite=0"),
    *("--innodb-file-per-table=0", "--sync-frm=0", "--innodb-stats-persistent=0"),
    *("--aria-log-file-size=8M", "--aria-pagecache-buffer-size=8M", "--performance-schema=0"),
)


def start_database(folder: Path) -> None:
    """Start MariaDB in the background and wait until it listens; create its database first if it has none.

    Raises:
        ClusterError: It failed; with the last lines of its output.
    """
    part = folder / "mariadb"
    data, log = part / "data", part / "log"
    command = ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={part}/socket", f"--tmpdir={part}"]
    command += [*_DATABASE_OPTIONS, *(["--user=root"] if os.geteuid() == 0 else [])]
    env = {"PATH": search_path()}
    if not data.exists():
        (data / "mysql").mkdir(parents=True)
        # slurmdbd would create its database itself, but with libmariadb 11.8.9 it cannot after a failed connection.
        tables = "use mysql;\n" + _system_tables(env) + "\ncreate database slurm;\n"
        made = subprocess.run([*command, "--bootstrap"], input=tables, env=env, cwd=part, capture_output=True, text=True)
        if made.returncode or "ERROR:" in made.stderr:
            raise _database_error(made.stderr)
    (part / "socket").unlink(missing_ok=True)  # of one that was killed
    # Through a shell, which exits: mariadbd does not go into the background by itself.
    script = '"$@" </dev/null >>log 2>&1 & echo $!'
    shell = ["sh", "-c", script, "sh", *command]
    started = subprocess.run(shell, cwd=part, env=env, capture_output=True, text=True, start_new_session=True, check=True)
    pid = int(started.stdout)

    deadline = time.monotonic() + _READY_SECONDS
    while not listens(part / "socket"):
        if not Path("/proc", str(pid)).exists() or time.monotonic() > deadline:
            raise _database_error(log.read_text(errors="replace"))
        time.sleep(0.02)


def _system_tables(env: Mapping[str, str]) -> str:
    """The SQL that creates the system tables of the server, which the stored procedures of slurmdbd need."""
    shown = subprocess.run(["mariadbd", "--no-defaults", "--help", "--verbose"], env=env, capture_output=True, text=True).stdout
    if found := re.search(r"^character-sets-dir +(\S+)", shown, re.MULTILINE):
        for path in Path(found[1]).parent.glob("m*_system_tables.sql"):  # mysql_…, since MariaDB 11 mariadb_…
            return path.read_text()
    raise ClusterError("MariaDB is installed without the SQL of its system tables (mysql_system_tables.sql).")


def _database_error(output: str) -> ClusterError:
    lines = [line for line in output.splitlines() if "ERROR" in line] or output.splitlines()
    return ClusterError("\n  ".join(["mariadbd failed; it says:", *lines[-5:]]))


def write_slurmdbd_conf(folder: Path, port: int) -> None:
    """Write slurmdbd.conf, which must be private."""
    path = folder / "slurmdbd.conf"
    loopback = "CommunicationParameters=NoInAddrAny\n" if host_is_loopback() else ""
    path.write_text(_SLURMDBD_CONF.format(folder=folder, user=user_name(), port=port) + loopback)
    path.chmod(0o600)


def database_environment(folder: Path) -> dict[str, str]:
    """The variable with which slurmdbd finds the socket of the database."""
    return {"MYSQL_UNIX_PORT": f"{folder}/mariadb/socket"}


def listens(address: Path | int) -> bool:
    """Whether a process listens on a Unix socket, or on a port of 127.0.0.1."""
    family, target = (socket.AF_UNIX, str(address)) if isinstance(address, Path) else (socket.AF_INET, ("127.0.0.1", address))
    with socket.socket(family) as probe:
        return probe.connect_ex(target) == 0


def accounts_command(folder: Path, cluster: str) -> list[str]:
    """Write a file with the cluster, an account and its user, and return the command that loads it into slurmdbd."""
    path = folder / "slurmdbd" / "accounts"
    path.write_text(_ACCOUNTS.format(cluster=cluster, account=ACCOUNT, user=user_name()))
    return ["sacctmgr", "--immediate", "--quiet", "load", str(path)]
