#!/usr/bin/env bash
# Run a command in a clone of this checkout, in a root of the Debian release that has a version of Slurm:
#
#     slurm/debian.sh 24.11 make test-slurm
#
# The root is made once, in ~/.cache/lockstep, by debootstrap, which is installed if it is missing. It needs root, and about 10 GB.
# The clone has the last commit, not what is uncommitted.
set -euo pipefail

case ${1-} in
22.05) release=bookworm ;; # Debian 12, Python 3.11
24.11) release=trixie ;;   # Debian 13, Python 3.13
*) echo "usage: slurm/debian.sh 22.05|24.11 COMMAND…" >&2 && exit 2 ;;
esac
shift
[ "$(id -u)" = 0 ] || { echo "slurm/debian.sh: run it as root; it mounts file systems and calls chroot." >&2 && exit 2; }
command -v debootstrap >/dev/null || apt-get install -y -qq debootstrap >/dev/null ||
  { echo "slurm/debian.sh: install debootstrap (apt-get install debootstrap)." >&2 && exit 2; }

checkout=$(cd "$(dirname "$0")/.." && pwd)
root=${XDG_CACHE_HOME:-$HOME/.cache}/lockstep/debian-$release
cache=${UV_CACHE_DIR:-$HOME/.cache/uv}

if [ ! -e "$root/.made" ]; then
  echo "== debian: making $root"
  rm -rf "$root"
  mkdir -p "$root" "$cache"
  debootstrap --variant=minbase "$release" "$root" >"$root.log" || { echo "debootstrap failed; see $root.log" >&2 && exit 1; }
  DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y -qq --no-install-recommends \
    ca-certificates git libpython3-dev make procps python3-pip python3-venv >>"$root.log"
  touch "$root/.made"
fi

[ -d "$root/lockstep" ] || git clone --quiet "$checkout" "$root/lockstep"
git -C "$root/lockstep" fetch --quiet "$checkout" HEAD
git -C "$root/lockstep" reset --quiet --hard FETCH_HEAD

# A mount namespace of its own: nothing stays mounted.
export checkout root cache
exec unshare --mount --propagation private bash -euc '
  mount --bind /proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mkdir -p "$root/root/.cache/uv"
  mount --bind "$cache" "$root/root/.cache/uv"
  mount --bind /etc/ssl/certs "$root/etc/ssl/certs"
  cp /etc/resolv.conf "$root/etc/resolv.conf"
  echo "127.0.0.1 localhost $(hostname)" >"$root/etc/hosts"
  exec chroot "$root" env --unset=MAKEFLAGS --unset=MAKELEVEL --unset=SLURM --chdir=/lockstep HOME=/root "$@"' bash "$@"
