#!/usr/bin/env bash
# How fast views are made, beside what people use otherwise: the tables and pictures in results/.
#
#   benchmarks/views.sh IMAGES.beton IMAGES_RAW256.beton CIFAR10.beton [CORES]
#
# The second file is made by: relssl convert FOLDER IMAGES_RAW256.beton --mode raw --resolution 256
# Nothing else may run beside it. On two cores it takes about ten minutes.
set -euo pipefail
if [[ $# -lt 3 || $# -gt 4 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
jpeg=$1 raw=$2 cifar=$3 cores=${4:-$(nproc)}
results="$(dirname "$0")/results"
python=${PYTHON:-python}

bench() { # NAME FILE OPTION...
    local name=$1 file=$2
    shift 2
    "$python" -m relssl bench views "$file" --cores "$cores" \
        --json "$results/views_$name.json" --plot "$results/views_$name.svg" "$@"
}

bench jpeg "$jpeg" --case 2x224 --case 5sizes
bench raw256 "$raw" --baseline-data "$jpeg" --case 2x224 --engine torchvision --engine ffcv
bench cifar10 "$cifar" --case cifar-k32 --measure views # stock FFCV would compile 32 loaders for its crops
