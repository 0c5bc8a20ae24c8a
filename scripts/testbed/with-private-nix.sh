#!/bin/bash
# usage: with-private-nix.sh DIRECTORY COMMAND [ARGUMENT...]   (as root)
#
# Runs COMMAND where DIRECTORY is /nix and everything else is the host's. Store paths hold the string /nix/store, so
# real Nix must build there; the host's own /nix, if it has one, must neither be changed nor be found by what is tested.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
  exec unshare --mount --propagation private -- "$0" --inside "$@"
fi
shift
directory=$1
shift

root=$directory/root
mkdir -p "$directory/nix" "$root"
mount -t tmpfs -o mode=0755 none "$root"
# Otherwise the recursive bind of the directory that holds $root would hold $root again.
mount --make-unbindable "$root"
for entry in /*; do
  name=${entry#/}
  if [ "$name" = nix ]; then
    continue
  elif [ -L "$entry" ]; then
    cp -P "$entry" "$root/$name"
  elif [ -d "$entry" ]; then
    mkdir "$root/$name"
    mount --rbind "$entry" "$root/$name"
  fi
done
mkdir "$root/nix"
mount --bind "$directory/nix" "$root/nix"
exec chroot "$root" "$@"
