#!/usr/bin/env bash
# A compiler launcher (CMAKE_CXX_COMPILER_LAUNCHER) that compiles the same text with the same flags only once: the gate builds
# the same sources as a clone, as a source distribution and as a newcomer. Objects are kept in PYLLAMA_OBJECTS under a hash of
# compiler, flags and what the preprocessor made of the source: every header is still looked for, found and read. Knows
# the commands that CMake writes for gcc and clang; deletes nothing. Without PYLLAMA_OBJECTS it only compiles.
set -euo pipefail
[ -n "${PYLLAMA_OBJECTS:-}" ] || exec "$@"

command=("$@")
object="" key=""
preprocess=("$1" -E -P)
shift
while [ $# -gt 0 ]; do
  case $1 in
    -o) object=$2 && shift ;;
    -c) preprocess+=("$2") && shift ;;
    # Names: what they lead to is in the text, where assert() must not bring them back.
    -isystem) preprocess+=("$1" "$2" "-fmacro-prefix-map=$2=") && command+=("-fmacro-prefix-map=$2=") && shift ;;
    -MF | -MT) preprocess+=("$1" "$2") && shift ;;
    -I*) preprocess+=("$1") ;;
    *) preprocess+=("$1") key+=" $1" ;;
  esac
  shift
done

mkdir -p "$PYLLAMA_OBJECTS"
key=$({ echo "$key" && "${command[0]}" --version && "${preprocess[@]}"; } | sha256sum | cut -d' ' -f1)
kept=$PYLLAMA_OBJECTS/$key.o
if [ ! -e "$kept" ]; then
  "${command[@]}"
  cp "$object" "$kept.$$" && mv "$kept.$$" "$kept"
else
  cp "$kept" "$object"
fi
