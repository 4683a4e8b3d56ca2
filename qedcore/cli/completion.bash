# bash completion for qed(1): install as /usr/share/bash-completion/completions/qed

_qed() {
    # The words as the shell passes them on: COMP_WORDS is cut at colons and equals signs, too.
    local line=${COMP_LINE:0:COMP_POINT} words=() part
    for part in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do
        if [[ ! $part || ! ${words[*]} || $line == [[:space:]]* ]]; then
            words+=('')
            line=${line#"${line%%[![:space:]]*}"}
        fi
        words[-1]+=$part
        line=${line#"$part"}
    done
    local word=${words[-1]} previous= command= format= i
    ((${#words[@]} > 1)) && previous=${words[-2]}
    local caches='none writeback writethrough directsync unsafe'
    local formats='qed raw qcow2 qcow vmdk vdi vhdx vpc parallels'
    local ours='cluster_size= table_size= size= backing_file= backing_fmt= preallocation= nocow= extent_size_hint='
    local commands='create info check salvage resize rebase commit compact map dump compare convert dd measure bench
        snapshot amend bitmap help'
    for ((i = 1; i < ${#words[@]} - 1; i++)); do
        case ${words[i]} in
            -T | --trace) [[ $command ]] || ((i++)) ;;
            -O | -f | --format)
                [[ $command == create || ${words[i]} == -O ]] && format=${words[i + 1]}
                ;;
            -*) ;;
            *) [[ $command ]] || command=${words[i]} ;;
        esac
    done
    if [[ ! $command || $command == help ]]; then
        _qed_offer "${command:+$commands}${command:-$commands --help --version --debug --trace}"
        return
    fi
    case $previous in
        -f | --format | -F | -O) _qed_offer "$formats"; return ;;
        -t | -T) _qed_offer "$caches"; return ;;
        --output) _qed_offer 'human json'; return ;;
        --preallocation) _qed_offer 'off metadata falloc full'; return ;;
        -i) [[ $command == bench ]] && { _qed_offer 'threads native io_uring'; return; } ;;
        -r) [[ $command == check ]] && { _qed_offer 'leaks all'; return; } ;;
        -o)
            if [[ $command != bench ]]; then
                [[ $format || $command == create ]] || format=raw
                case $format in
                    qed | '') ;;
                    raw) ours='size= preallocation= nocow= extent_size_hint=' ;;
                    *) ours=$(qemu-img create -f "$format" -o help x 2>/dev/null | sed -n 's/^  \([a-z_.-]*\)=.*/\1=/p') ;;
                esac
                local before=
                [[ $word == *,* ]] && before=${word%,*},
                word=${word##*,}
                _qed_offer "$ours help" "$before"
                return
            fi
            ;;
    esac
    case $word in
        --output=*) word=${word#*=} _qed_offer 'human json'; return ;;
        --preallocation=*) word=${word#*=} _qed_offer 'off metadata falloc full'; return ;;
        --format=*) word=${word#*=} _qed_offer "$formats"; return ;;
        -*)
            local options='--help --debug --image-opts --object'
            case $command in
                create) options+=' -f --format -q --quiet -b -F -u -o' ;;
                info) options+=' -f --format -U --force-share --output= --backing-chain -v --verbose' ;;
                check)
                    options+=' -f --format -q --quiet -p --progress -U --force-share -T -r --dry-run --force'
                    options+=' -v --verbose --output='
                    ;;
                resize) options+=' -f --format -q --quiet --shrink --preallocation=' ;;
                rebase) options+=' -f --format -q --quiet -p --progress -U --force-share -t -T -b -F -u' ;;
                commit) options+=' -f --format -q --quiet -p --progress -t -d -b -r' ;;
                compact) options+=' -f --format -q --quiet -p --progress -t --zeros' ;;
                map) options+=' -f --format -U --force-share --output= -s --start-offset= -l --max-length=' ;;
                dump) options+=' -f --format -U --force-share --output= --header --l1 --l2' ;;
                compare) options+=' -f --format -F -p --progress -q --quiet -s --strict -T -U --force-share' ;;
                convert)
                    options+=' -f --format -O -o -B -b -F -n -p --progress -q --quiet -S -t -T -U --force-share -r'
                    options+=' --target-is-zero --target-image-opts --salvage -c -l --bitmaps -m -W -C'
                    ;;
                measure) options+=' -f --format -O -o -U --force-share --size= --output= -l' ;;
                dd) options+=' -f --format -O -U --force-share' ;;
                bench)
                    options+=' -f --format -q --quiet -t -U --force-share -c -d -o -s -S -w --pattern='
                    options+=' --flush-interval= --no-drain -i -n'
                    ;;
                snapshot) options+=' -f --format -q --quiet -U --force-share -l -a -c -d' ;;
                amend) options+=' -f --format -q --quiet -p --progress -t -o --force' ;;
                bitmap)
                    options+=' -f --format --add --remove --clear --enable --disable --merge -g -b -F'
                    ;;
                salvage)
                    options+=' -q --quiet -p --progress -U --force-share --output= --cluster-size= --table-size='
                    options+=' --size= --guess'
                    ;;
            esac
            _qed_offer "$options"
            return
            ;;
    esac
    if [[ $command == dd ]]; then
        case $word in
            if=* | of=*) word=${word#*=} ;;
            *) _qed_offer 'bs= count= skip= if= of='; return ;;
        esac
    fi
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
    _qed_cut "$word"
}

# Offer the words of $1 that begin with $word, with $2 before each; no space after an equals sign.
_qed_offer() {
    local i
    compopt -o nospace
    mapfile -t COMPREPLY < <(compgen -P "${2-}" -W "$1" -- "$word")
    for i in "${!COMPREPLY[@]}"; do
        [[ ${COMPREPLY[i]} == *= ]] || COMPREPLY[i]+=' '
    done
    _qed_cut "${2-}$word"
}

# The shell replaces only what follows the last colon or equals sign of the word.
_qed_cut() {
    local i cut=
    [[ $COMP_WORDBREAKS == *:* && $1 == *:* ]] && cut=${1%"${1##*:}"}
    [[ $COMP_WORDBREAKS == *=* && $1 == *=* && ${#cut} -lt ${#1} ]] && cut=${1%"${1##*[:=]}"}
    for i in "${!COMPREPLY[@]}"; do
        COMPREPLY[i]=${COMPREPLY[i]#"$cut"}
    done
}

complete -F _qed qed
