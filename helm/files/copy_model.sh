#!/bin/sh
# copy_model.sh SOURCE TARGET [FLAG...]: copies a checkpoint folder with rclone, which reads its settings from RCLONE_*.
# Stores often hold the same weights several times. Where there are safetensors, which are what is read, the other formats
# beside them stay where they are. FLAGs go to rclone.
set -eu
source=$1
target=$2
shift 2
safetensors=$(rclone lsf --config= --files-only --include '/model.safetensors*' "$source")
if [ -n "$safetensors" ]; then
  for pattern in '/*.bin' '/*.h5' '/*.msgpack' '/*.ot' '/*.gguf' '/*.onnx' '/consolidated*' '/original/**' '/onnx/**'; do
    set -- "$@" "--exclude=$pattern"
  done
fi
rclone copy --config= "$@" "$source" "$target"
if [ -z "$(ls -A "$target" 2>/dev/null)" ]; then
  echo "there is nothing at $source: check model.s3.bucket and model.s3.prefix" >&2
  exit 1
fi
