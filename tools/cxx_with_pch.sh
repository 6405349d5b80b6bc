#!/usr/bin/env bash
# A C++ compiler for building mmcv in minutes: nearly all of the plain build's time goes into parsing torch's headers
# again for each of 78 small files, so they are parsed once, into a precompiled header. mmcv's sources stay as they are.
#
# Use as CXX. The header is compiled at the first call with the very flags of that call, since gcc and clang ignore a
# precompiled header whose flags differ. mmcv asks for C++17 and torch's headers from 2.14 on for C++20, so that is tried
# where the header fails; where both do, everything is compiled plainly: slower, nothing else.
# Environment: REAL_CXX, the compiler (default c++); PCH_DIR, a scratch folder.
set -euo pipefail
cxx=${REAL_CXX:-c++} header=$PCH_DIR/torch.h

flags=() compiles=false skip=false
for argument in "$@"; do
  if $skip; then skip=false; continue; fi
  case $argument in
    -c) compiles=true ;;
    -o | -MF | -MT | -MQ) skip=true ;;
    -MMD | -MD | *.cpp | *.o) ;;
    *) flags+=("$argument") ;;
  esac
done
$compiles || exec $cxx "$@" # unquoted, here and below: CXX may hold a command with arguments

mkdir -p "$PCH_DIR"
if mkdir "$PCH_DIR/lock" 2>/dev/null; then # ninja starts several compilers at once; the first one makes the header
  echo '#include <torch/types.h>' >"$header"
  for standard in '' -std=c++20; do
    # Unquoted: nothing where it is empty. The last -std of a call is the one that counts.
    if $cxx "${flags[@]}" $standard -x c++-header "$header" -o "$PCH_DIR/making.gch"; then
      mv "$PCH_DIR/making.gch" "$header.gch"
      break
    fi
    echo "no precompiled header with ${standard:-the flags as they are}" >&2
  done
  echo "$standard" >"$PCH_DIR/deciding"
  mv "$PCH_DIR/deciding" "$PCH_DIR/decided"
fi
until [ -e "$PCH_DIR/decided" ]; do sleep 0.2; done
[ -e "$header.gch" ] || exec $cxx "$@"
exec $cxx -Winvalid-pch -include "$header" "$@" $(cat "$PCH_DIR/decided")
