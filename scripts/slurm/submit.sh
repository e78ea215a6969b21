#!/usr/bin/env bash
# A table on a Slurm cluster: an array of jobs with a GPU each, then the table.
#   ROWS=paper BATCH=8 JOBS=16 SBATCH_PARTITION=gpu bash scripts/slurm/submit.sh table1
# Settings as in scripts/table1.sh; JOBS= of the array; each gets GRES=gpu:1 (or none) and
# CPUS=8; SBATCH_... as sbatch reads them. First, on a node with a network: python -m eval prefetch configs/table1.yaml
set -euo pipefail
say() { echo "error: $*" >&2; exit 2; }
[ $# = 1 ] || say "name one table: bash scripts/slurm/submit.sh table1 (or table2, table3)"
[ -n "${CONFIG:-}" ] || [ -f "$(dirname "$0")/../../configs/$1.yaml" ] ||
    say "there is no configs/$1.yaml; CONFIG= names a table of your own"
command -v sbatch > /dev/null ||
    say "sbatch is not here: log in to a node of the cluster, or run without Slurm: bash scripts/$1.sh"
here=$(cd "$(dirname "$0")" && pwd)
export ROOT=${here%/scripts/slurm} TABLE=$1 OUT=${OUT:-results}
mkdir -p "$OUT/logs"
gres=${GRES:-gpu:1}
[ "$gres" = none ] && gres= || gres=--gres=$gres
array=$(sbatch --parsable --array="1-${JOBS:-8}" $gres --cpus-per-task="${CPUS:-8}" \
        --output="$OUT/logs/%A_%a.log" "$here/run.sbatch")
merge=$(sbatch --parsable --dependency="afterany:$array" --output="$OUT/logs/%j.log" "$here/merge.sbatch")
echo "array $array, then the table: job $merge writes $OUT/$TABLE.md; logs in $OUT/logs"
