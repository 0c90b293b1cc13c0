#!/usr/bin/env bash
# The CPU image without a container engine: the same layers in a folder, made and tried with Debian's mmdebstrap.
#
#   chroot.sh build FOLDER     the system in FOLDER, with what Dockerfile and dsiprep.def install; needs root and network
#   chroot.sh try FOLDER       in it, read-only, as another user, without network and without a home: a phantom of 6 mm
#                              is simulated, preprocessed and scored; then the size is compared with the limit
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
LIMIT_MB=1500
USER_ID=12345

build() {
  local root=$1 work
  mkdir -p "$root"
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates,binutils,usr-is-merged \
    --format=directory \
    --dpkgopt=path-exclude=/usr/share/{doc,man,info,locale}/'*' "${SUITE:-bookworm}" "$root"
  work=$(mktemp -d)
  python3 -m venv "$work/venv"
  "$work/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$here/.."
  mkdir -p "$root/src"
  cp "$work"/dsiprep-*.whl "$here"/{install.sh,slim.sh,requirements.lock,torch.version} "$root/src"
  rm -r "$work"
  inside_with_network "$root" bash -c 'bash /src/install.sh /src/dsiprep-*.whl cpu'
  inside_with_network "$root" apt-get purge --yes --quiet --quiet python3-venv python3-pip-whl python3-setuptools-whl binutils \
    usrmerge perl 'perl-modules-.*' 'libperl5.*' # the last four came with usrmerge, whose place usr-is-merged takes
  inside_with_network "$root" apt-get autoremove --yes --quiet --quiet
  rm -rf "$root/src" "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
  mkdir -p "$root/templateflow" "$root/data"
}

inside_with_network() { # FOLDER COMMAND...: as root, with this machine's certificates and, if there is one, wheel folder
  local root=$1
  shift
  unshare --mount bash -euc '
    root=$1 && shift
    mount --bind "$root" "$root" && mount -t proc proc "$root/proc" && mount --rbind /dev "$root/dev"
    for path in /etc/resolv.conf /etc/ssl/certs ${PIP_FIND_LINKS:-}; do
      [ -e "$path" ] || continue
      if [ -d "$path" ]; then mkdir -p "$root$path"; else touch "$root$path"; fi
      mount --bind "$path" "$root$path"
    done
    exec chroot "$root" env HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive "$@"
  ' _ "$root" "$@"
}

inside() { # FOLDER DATA COMMAND...: read-only but for DATA, which is /data there, and /tmp; no network, no home
  local root=$1 data=$2
  shift 2
  unshare --mount --net --pid --fork --ipc bash -euc '
    root=$1 data=$2 user=$3 && shift 3
    mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
    mount --bind "$data" "$root/data" && mount -t tmpfs tmpfs "$root/tmp" && mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for node in null zero random urandom; do touch "$root/dev/$node" && mount --bind "/dev/$node" "$root/dev/$node"; done
    mkdir "$root/dev/shm" && chmod 1777 "$root/dev/shm"
    exec chroot --userspec="$user:$user" --groups= "$root" env -i \
      PATH=/opt/dsiprep/bin:/usr/bin:/bin PYTHONNOUSERSITE=1 MPLCONFIGDIR=/tmp/matplotlib \
      TEMPLATEFLOW_HOME=/templateflow TEMPLATEFLOW_AUTOUPDATE=off HOME=/nonexistent "$@"
  ' _ "$root" "$data" "$USER_ID" "$@"
}

try() {
  local root=$1 data size
  data=$(mktemp -d)
  chown "$USER_ID" "$data"
  inside "$root" "$data" sh -c 'touch /opt/dsiprep/written 2>/dev/null && exit 1; id -u; dsiprep --version'
  inside "$root" "$data" dsiprep-tools phantom /data/phantom --scheme hasc55 --resolution 6 --t1w-resolution 3 --no-ideal
  inside "$root" "$data" dsiprep /data/phantom/bids /data/out participant --output-resolution 6 --sloppy \
    --work-dir /data/work --nprocs "${NPROCS:-1}"
  inside "$root" "$data" dsiprep-tools score /data/out /data/phantom/truth
  test -s "$data/out/sub-01.html"
  rm -r "$data"
  size=$(du -sxm "$root" | cut -f1)
  echo "unpacked: $size MB"
  [ "$size" -le "$LIMIT_MB" ]
}

case ${1:-} in
build | try) "$@" ;;
*)
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 2
  ;;
esac
