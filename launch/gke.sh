#!/usr/bin/env bash
# Trains on GKE: fills in and applies launch/gke_jobset_tpu.yaml or gke_jobset_gpu.yaml.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/gke.sh --name=N --image=I --bucket=B --accelerator=A (--topology=T | --nodes=K) [options] -- COMMAND...

    launch/gke.sh --name=b4 --image=REGION-docker.pkg.dev/P/R/dit_jax:COMMIT --bucket=my-bucket \
        --accelerator=tpu-v6e-slice --topology=4x4 -- \
        python -m dit_jax.main --config=configs/imagenet.py:B/4,256 --workdir=/gcs/b4 --config.data.path=/gcs/tfds
    launch/gke.sh --name=b4 --image=... --bucket=my-bucket --accelerator=nvidia-h200-141gb --nodes=4 -- python -m dit_jax.main ...

  --name=N               name of the JobSet
  --image=I              image of launch/Dockerfile, by tag or digest; `latest` is refused, because a restart could run other code
  --bucket=B             Cloud Storage bucket, mounted in every pod at --mount; it needs a hierarchical namespace (checkpoints
                         are committed by renaming a folder), and the service account needs write access
  --mount=FOLDER         default /gcs
  --accelerator=A        node label: gke-tpu-accelerator (tpu-v6e-slice, tpu-v5p-slice, ...) or gke-accelerator
  --topology=T           for TPUs: chips of the slice, 4x4 or 4x4x4
  --nodes=K              for GPUs: number of nodes
  --chips-per-host=C     chips or GPUs per node; default 4 with --topology, 8 with --nodes
  --namespace=S --service-account=S   default `default`
  --dry-run              print the manifest and the command, apply nothing

COMMAND runs unchanged, once per node; its --workdir= (or --out=) must be under --mount. Needs kubectl, python3 and JobSet v0.7 or
newer in the cluster. Applying the same command again changes nothing. A JobSet that has ended, or that differs, is refused with
instructions. Preempted or stopped (exit status 75) pods are restarted without limit, other failures three times.
TEXT
}

die() {
    echo "gke: error: $1" >&2
    exit 2
}

name='' image='' bucket='' mount=/gcs accelerator='' topology='' nodes='' chips='' namespace=default service_account=default dry_run=''
command=()
while (($#)); do
    case $1 in
        --name=*) name=${1#*=} ;;
        --image=*) image=${1#*=} ;;
        --bucket=*) bucket=${1#*=} ;;
        --mount=*) mount=${1#*=} ;;
        --accelerator=*) accelerator=${1#*=} ;;
        --topology=*) topology=${1#*=} ;;
        --nodes=*) nodes=${1#*=} ;;
        --chips-per-host=*) chips=${1#*=} ;;
        --namespace=*) namespace=${1#*=} ;;
        --service-account=*) service_account=${1#*=} ;;
        --dry-run) dry_run=1 ;;
        --help) usage && exit 0 ;;
        --)
            shift
            command=("$@")
            break
            ;;
        *) die "unknown option $1; options are --name=value, and COMMAND comes after --; see --help" ;;
    esac
    shift
done

[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || die "--name=$name must be 1 to 40 lower-case letters, digits and -"
for word in "$namespace" "$service_account" "$accelerator"; do
    [[ $word =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || die "'$word' (--accelerator, --namespace or --service-account) is not a Kubernetes name"
done
[[ $bucket =~ ^[a-z0-9][-a-z0-9_.]+$ ]] || die "--bucket=$bucket must be a bucket's name, without gs://"
[[ $mount =~ ^/[-a-zA-Z0-9_./]+$ ]] || die "--mount=$mount must be an absolute path"
[[ $image =~ ^[a-zA-Z0-9][-a-zA-Z0-9_./:@]+$ && ${image##*/} == *[:@]* && $image != *:latest ]] ||
    die "--image=$image must have a tag other than latest, or a digest"
((${#command[@]})) || die "give the command after --, as in -- python -m dit_jax.main --config=... --workdir=..."
[[ -z $topology || -z $nodes ]] || die "give --topology (TPU) or --nodes (GPU), not both"

if [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
    kind=tpu
    chips=${chips:-4}
elif [[ $nodes =~ ^[1-9][0-9]*$ ]]; then
    kind=gpu
    chips=${chips:-8}
else
    die "give --topology=4x4 or 4x4x4 (TPU), or --nodes=K (GPU); got --topology=$topology --nodes=$nodes"
fi
[[ $chips =~ ^[1-9][0-9]*$ ]] || die "--chips-per-host=$chips must be an integer of at least 1"
if [[ $kind == tpu ]]; then
    total=$((${topology//x/*}))
    ((total % chips == 0)) || die "--chips-per-host=$chips does not divide the $total chips of --topology=$topology"
    nodes=$((total / chips))
fi

folder=''
for ((i = 0; i < ${#command[@]}; i++)); do
    case ${command[i]} in
        --workdir=* | --out=*) folder=${command[i]#*=} ;;
        --workdir | --out) folder=${command[i + 1]:-} ;;
    esac
done
[[ $folder == "$mount"/* ]] || die "the command's --workdir= (or --out=) is '$folder'; a pod's own disk is lost with the pod: choose a folder under $mount"

# Kubernetes expands $(NAME) in commands, even where the user means something else; $$ stands for $.
manifest=$(python3 - "$(dirname "${BASH_SOURCE[0]}")/gke_jobset_$kind.yaml" "${command[@]//\$/\$\$}" <<PYTHON
import json, re, sys

values = {
    "NAME": "$name", "NAMESPACE": "$namespace", "SERVICE_ACCOUNT": "$service_account", "IMAGE": "$image", "BUCKET": "$bucket",
    "MOUNT": "$mount", "ACCELERATOR": "$accelerator", "TOPOLOGY": "$topology", "HOSTS": "$nodes", "CHIPS": "$chips",
    "COMMAND": json.dumps(sys.argv[2:]),
}
print(re.sub("@([A-Z_]+)@", lambda match: values[match[1]], open(sys.argv[1]).read()))
PYTHON
)

if [[ -n $dry_run ]]; then
    echo "$manifest"
    echo "+ kubectl apply --filename=-" >&2
    exit
fi

ended=$(kubectl get jobset "$name" --namespace="$namespace" --ignore-not-found '--output=jsonpath={.status.terminalState}')
[[ -z $ended ]] || die "JobSet $name is $ended. To start it again and resume from its workdir, run
  kubectl delete jobset $name --namespace=$namespace   and then the same command"
echo "$manifest" | kubectl apply --filename=- ||
    die "not applied. If JobSet $name differs from these options (most fields of a JobSet cannot be changed), stop it first:
  kubectl delete jobset $name --namespace=$namespace   saves and stops; then run the same command"
job=$name-$([[ $kind == tpu ]] && echo slice || echo nodes)-0
cat >&2 <<TEXT
gke: $name is applied and WILL BE BILLED while its nodes are running, including restarts, until it ends.
  first pod's log   kubectl logs --follow --namespace=$namespace --container=main --selector=batch.kubernetes.io/job-name=$job,batch.kubernetes.io/job-completion-index=0
  state             kubectl get jobset $name --namespace=$namespace
  save and stop     kubectl delete jobset $name --namespace=$namespace
TEXT
