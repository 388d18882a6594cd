#!/usr/bin/env bash
# Requests a Cloud TPU slice of TPU VMs, trains on it, and survives preemptions.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/tpu_vm.sh --name=N --zone=Z --accelerator-type=T --runtime-version=R [options] -- COMMAND...
launch/tpu_vm.sh --name=N --zone=Z --stop | --delete

Requests a TPU slice as a queued resource, waits for it, copies this repository's commit to all workers, installs it there, and
runs COMMAND on all of them. Shows the log of worker 0 and writes each worker's log to a file. If the slice is preempted or lost,
it is deleted and requested again, and COMMAND runs again: dit_jax.main resumes from its workdir. The same command again adopts
what exists: a waiting request, an idle slice, or a run in progress.

    launch/tpu_vm.sh --name=b4 --zone=europe-west4-b --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite \
        --spot --bucket=my-bucket -- \
        python -m dit_jax.main --config=configs/imagenet.py:B/4,256 --workdir=/mnt/my-bucket/b4 --config.data.path=/mnt/my-bucket/tfds

  --name --zone --accelerator-type --runtime-version   as in gcloud; --name is the name of the request and of the TPU
  --project=P            as in gcloud; without it gcloud's own default
  --spot                 spot VMs: cheaper, but they can be preempted at any time
  --create-flag=FLAG     additional flag for `queued-resources create`, such as --network=N or --valid-until-duration=6h; repeatable
  --ssh-flag=FLAG        additional flag for `tpu-vm ssh` and `scp`, such as --internal-ip; repeatable
  --bucket=B             mount gs://B on every worker with gcsfuse; it needs a hierarchical namespace, because checkpoints are
                         committed by renaming a folder, which is atomic only in such a bucket
  --mount=FOLDER         mount point of the bucket; default /mnt/B
  --revision=C           commit to run; default HEAD, which requires a clean work tree
  --logs=FOLDER          default logs/N; each start of COMMAND has its own folder there with worker_<i>.log
  --poll-seconds=S       interval between checks of the state; default 30
  --delete-when-done     delete the slice once COMMAND has ended with 0
  --stop                 make the run save and stop (without restart); the slice is kept
  --delete               delete the slice and its request, even if something runs there
  --dry-run              print every command and run none

COMMAND runs unchanged, with `python` from the installed environment, in the repository's folder. Its --workdir= (or --out=) must be
on --mount or a shared disk: every worker refuses a folder that would be lost with the VM. COMMAND runs detached: after Ctrl-C here,
or a lost connection, it continues to run and to be billed, and the same command again shows it.

Exit status: 0 if COMMAND is done; 75 if it was stopped with --stop; 130 after Ctrl-C; otherwise that of COMMAND or of gcloud.
The last lines always report what still exists and costs money.
TEXT
}

STOPPED_BY_HAND=76 # of tpu_worker.sh
SETTLING=4         # checks of the state after a failure: it may show a preemption later than the run does
TRIES=3            # failed requests in a row before giving up
RECONNECTIONS=20   # lost connections in a row, while the slice is healthy, before giving up

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' accelerator_type='' runtime_version='' project='' spot='' bucket='' mount='' revision=HEAD logs='' poll_seconds=30
action=run delete_when_done='' dry_run='' exists=''
create_flags=() ssh_flags=() command=()

say() { echo "tpu_vm: $*" >&2; }

die() {
    say "error: $1"
    exit "${2:-1}"
}

parse() {
    while (($#)); do
        case $1 in
            --name=*) name=${1#*=} ;;
            --zone=*) zone=${1#*=} ;;
            --accelerator-type=*) accelerator_type=${1#*=} ;;
            --runtime-version=*) runtime_version=${1#*=} ;;
            --project=*) project=${1#*=} ;;
            --spot) spot=1 ;;
            --create-flag=*) create_flags+=("${1#*=}") ;;
            --ssh-flag=*) ssh_flags+=("${1#*=}") ;;
            --bucket=*) bucket=${1#*=} ;;
            --mount=*) mount=${1#*=} ;;
            --revision=*) revision=${1#*=} ;;
            --logs=*) logs=${1#*=} ;;
            --poll-seconds=*) poll_seconds=${1#*=} ;;
            --delete-when-done) delete_when_done=1 ;;
            --stop | --delete) action=${1#--} ;;
            --dry-run) dry_run=1 ;;
            --help) usage && exit 0 ;;
            --)
                shift
                command=("$@")
                break
                ;;
            *) die "unknown option $1; options are --name=value, and COMMAND comes after --; see --help" 2 ;;
        esac
        shift
    done
    [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || die "--name=$name must be 1 to 63 lower-case letters, digits and -" 2
    [[ -n $zone ]] || die "give --zone" 2
    logs=${logs:-logs/$name}
    [[ $action == run ]] || return 0
    [[ -n $accelerator_type && -n $runtime_version ]] || die "give --accelerator-type and --runtime-version" 2
    ((${#command[@]})) || die "give the command after --, as in -- python -m dit_jax.main --config=... --workdir=..." 2
    [[ -z $bucket || $bucket != gs://* ]] || die "--bucket=$bucket must be a bucket's name, without gs://" 2
    [[ -z $mount || -n $bucket ]] || die "--mount=$mount needs --bucket" 2
    mount=${mount:-${bucket:+/mnt/$bucket}}
    find_folder
}

# Finds the folder to which COMMAND writes results.
find_folder() {
    local i word
    folder=''
    for ((i = 0; i < ${#command[@]}; i++)); do
        word=${command[i]}
        case $word in
            --workdir=* | --out=*) folder=${word#*=} ;;
            --workdir | --out) folder=${command[i + 1]:-} ;;
        esac
    done
    [[ $folder == /* ]] || die "the command's --workdir= (or --out=) is '$folder'; give an absolute path on --mount or a shared disk" 2
    [[ -z $mount || $folder == "$mount"/* ]] || say "note: $folder is not under $mount; it must be on another shared disk"
}

# Prints a gcloud command and runs it.
cloud() {
    local words=(gcloud "$@" --quiet)
    [[ -z $project ]] || words+=("--project=$project")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${words[@]}" && echo
    else
        { printf '+ ' && printf '%q ' "${words[@]}" && echo; } >&2
        "${words[@]}"
    fi
}

on_workers() { # worker(s), command line
    cloud compute tpus tpu-vm ssh "$name" "--zone=$zone" "--worker=$1" "--command=$2" ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# Prints a field of the request or the TPU, or ABSENT if it does not exist. Other failures of gcloud are retried: treating one as
# ABSENT would request a second slice.
field() { # queued-resources or tpu-vm, format
    local answer errors try
    errors=$(mktemp)
    for ((try = 0; try < 20; try++)); do
        if answer=$(cloud compute tpus "$1" describe "$name" "--zone=$zone" "--format=$2" 2>"$errors"); then
            rm "$errors"
            echo "$answer"
            return
        elif grep -q NOT_FOUND "$errors"; then
            rm "$errors"
            echo ABSENT
            return
        fi
        sed 's/^/tpu_vm: /' "$errors" >&2
        sleep "$poll_seconds"
    done
    rm "$errors"
    say "error: gcloud cannot determine the state of $name; it may exist and be billed"
    return 1
}

# Prints the state: ABSENT, WAITING, READY, LEAVING, LOST (preempted, suspended) or FAILED.
look() {
    local request node
    request=$(field queued-resources 'value(state.state)') || return
    case $request in
        ABSENT | FAILED) echo "$request" ;;
        SUSPENDING | DELETING) echo LEAVING ;;
        SUSPENDED) echo LOST ;;
        ACTIVE)
            node=$(field tpu-vm 'value(state)') || return
            case $node in
                READY) echo READY ;;
                PREEMPTED | TERMINATED | STOPPED | ABSENT) echo LOST ;;
                *) echo WAITING ;;
            esac
            ;;
        *) echo WAITING ;;
    esac
}

create() {
    cloud compute tpus queued-resources create "$name" "--node-id=$name" "--zone=$zone" "--accelerator-type=$accelerator_type" \
        "--runtime-version=$runtime_version" ${spot:+--spot} ${create_flags[@]+"${create_flags[@]}"}
}

delete() {
    cloud compute tpus queued-resources delete "$name" "--zone=$zone" --force
    exists=''
}

check_bucket() {
    [[ -n $bucket ]] || return 0
    local answer
    answer=$(cloud storage buckets describe "gs://$bucket" --raw '--format=value(hierarchicalNamespace.enabled)')
    if [[ -n $dry_run ]]; then
        echo "$answer"
    elif [[ $answer != True ]]; then
        die "gs://$bucket has no hierarchical namespace, so that checkpoints cannot be committed atomically. Create a bucket with
  gcloud storage buckets create gs://OTHER --location=... --uniform-bucket-level-access --enable-hierarchical-namespace" 2
    fi
}

# Packs the commit into a file to copy; its date determines the versions of all dependencies.
pack() {
    commit=$(git -C "$root" rev-parse --verify --quiet "$revision^{commit}") || die "--revision=$revision is not a commit of $root" 2
    if [[ $revision == HEAD && -n $(git -C "$root" status --porcelain) ]]; then
        die "uncommitted changes in $root would not reach the workers; commit them, or give --revision" 2
    fi
    date=$(git -C "$root" show --no-patch --format=%cI "$commit")
    checkout=dit_jax-${commit:0:12}
    scratch=$(mktemp -d)
    git -C "$root" archive --format=tar.gz --output="$scratch/$checkout.tar.gz" "$commit"
}

worker_script() {
    printf 'bash %q/launch/tpu_worker.sh' "$checkout"
    printf ' %q' "$@"
}

prepare() {
    local type
    type=$(field tpu-vm 'value(acceleratorType)') || return
    if [[ -n $dry_run ]]; then
        echo "$type"
    elif [[ $type != "$accelerator_type" ]]; then
        die "$name exists as a $type, not a $accelerator_type; give another --name, or --delete it first" 2
    fi
    cloud compute tpus tpu-vm scp "$scratch/$checkout.tar.gz" "$name:" "--zone=$zone" --worker=all \
        ${ssh_flags[@]+"${ssh_flags[@]}"} &&
        on_workers all "[ -d $checkout ] || { rm -rf $checkout.partial && mkdir $checkout.partial && \
tar -xzf $checkout.tar.gz -C $checkout.partial && mv $checkout.partial $checkout; }" &&
        on_workers all "$(worker_script install "$date")" &&
        if [[ -n $bucket ]]; then on_workers all "$(worker_script mount "$bucket" "$mount")"; fi
}

# Copies worker 0 to stdout, every worker to a file, and gcloud's own messages to stderr. gcloud's --output-directory does not work:
# version 528 writes to a folder called None (tpu_vm/ssh.py resets output_directory_path before its use).
split_logs() {
    local line worker
    while IFS= read -r line; do
        worker=${line%%|*}
        if [[ $line == *"|"* && $worker =~ ^[0-9]+$ ]]; then
            printf '%s\n' "${line#*|}" >>"$1/worker_$worker.log"
            [[ $worker != 0 ]] || printf '%s\n' "${line#*|}"
        else
            printf '%s\n' "$line" >&2
        fi
    done
}

run() { # attempt
    local folder_of_logs hosts line
    hosts=$(cloud compute tpus tpu-vm describe "$name" "--zone=$zone" '--flatten=networkEndpoints[]' \
        '--format=value(networkEndpoints.ipAddress)') || return
    if [[ -n $dry_run ]]; then
        echo "$hosts"
        on_workers all "$(worker_script run "$1" HOSTS "$folder" "${command[@]}")"
        return
    fi
    folder_of_logs=$logs/$(date -u +%Y%m%dT%H%M%SZ)
    while [[ -e $folder_of_logs ]]; do folder_of_logs+=_; done
    mkdir -p "$folder_of_logs" || return
    say "running on $(wc -l <<<"$hosts") hosts; logs in $folder_of_logs"
    line=$(worker_script run "$1" "$(wc -l <<<"$hosts")" "$folder" "${command[@]}")
    on_workers all "$line" | split_logs "$folder_of_logs"
}

# Runs the command until it has ended for good; sets `status`.
train() {
    local attempt requests=0 failures=0 lost=0 state shown='' try
    attempt=$(date +%s).$$
    while :; do
        if [[ -n $dry_run ]]; then
            field queued-resources 'value(state.state)' && create && field tpu-vm 'value(state)' && prepare && run "$attempt"
            return 0
        fi
        state=$(look)
        [[ $state == ABSENT ]] || exists=1
        [[ $state == "$shown" ]] || say "$name is $state"
        shown=$state
        case $state in
            ABSENT)
                if create; then
                    requests=0 exists=1
                else
                    ((++requests < TRIES)) || die "$TRIES requests in a row were refused"
                fi
                ;;
            LOST) delete ;;
            FAILED)
                field queued-resources 'yaml(state)' >&2
                ((++failures < TRIES)) || die "$TRIES requests in a row failed; the reason is above"
                delete
                ;;
            READY)
                failures=0 status=0
                # set -e has no effect on the left of ||, so prepare and run return their failures.
                { prepare && run "$attempt"; } || status=$?
                case $status in
                    0 | 2) return 0 ;;
                    "$STOPPED_BY_HAND")
                        status=75
                        return 0
                        ;;
                esac
                say "the command ended with $status; checking whether $name was preempted"
                for ((try = 0; try < SETTLING; try++)); do
                    sleep "$poll_seconds"
                    state=$(look)
                    [[ $state == READY ]] || break
                done
                if [[ $state != READY || $status == 75 ]]; then
                    attempt=$(date +%s).$$.$((++starts)) lost=0
                elif [[ $status == 255 ]]; then # of ssh: the command may still be running, or have ended
                    ((++lost < RECONNECTIONS)) || die "$RECONNECTIONS connections in a row were lost" 255
                else
                    return 0
                fi
                continue
                ;;
        esac
        sleep "$poll_seconds"
    done
}

farewell() {
    [[ -z ${scratch:-} ]] || rm -rf "$scratch"
    [[ -n $exists ]] || return 0
    say "$name in $zone EXISTS AND IS BILLED; a command there continues to run, and the same command again shows it. To end the cost:"
    say "  ${BASH_SOURCE[0]} --name=$name --zone=$zone${project:+ --project=$project} --delete"
}

main() {
    local status=0 starts=0
    parse "$@"
    case $action in
        stop)
            exists=1
            on_workers all 'bash dit_jax_run/worker.sh mark'
            on_workers 0 'bash dit_jax_run/worker.sh stop'
            ;;
        delete)
            exists=1
            delete
            ;;
        run)
            pack
            check_bucket
            train
            if [[ $status == 0 && -n $delete_when_done ]]; then delete; fi
            ;;
    esac
    return "$status"
}

trap farewell EXIT
trap 'exit 130' INT TERM
main "$@"
