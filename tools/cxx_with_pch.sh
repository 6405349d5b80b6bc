#!/usr/bin/env bash
# A C++ compiler for building mmcv in minutes: nearly all of the plain build's time goes into parsing torch's headers
# again for each of 78 small files, so they are parsed once, into a precompiled header. mmcv's sources stay as they are.
#
# Use as CXX. The header is compiled at the first call with the very flags of that call, since gcc and clang ignore a
# precompiled header whose flags differ. Environment: REAL_CXX, the compiler (default c++); PCH_DIR, a scratch folder.
set -euo pipefail
cxx=${REAL_CXX:-c++}

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
$compiles || exec "$cxx" "$@"

mkdir -p "$PCH_DIR"
exec 9>"$PCH_DIR/lock"
flock 9 # ninja starts several compilers at once; the first one makes the header
if [ ! -e "$PCH_DIR/torch.h.gch" ]; then
  echo '#include <torch/types.h>' >"$PCH_DIR/torch.h"
  "$cxx" "${flags[@]}" -x c++-header "$PCH_DIR/torch.h" -o "$PCH_DIR/making.gch"
  mv "$PCH_DIR/making.gch" "$PCH_DIR/torch.h.gch"
fi
exec 9>&-
exec "$cxx" -include "$PCH_DIR/torch.h" "$@"
