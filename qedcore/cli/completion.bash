# bash completion for qed(1): install as /usr/share/bash-completion/completions/qed

_qed() {
    local word=$2 previous=$3 command=
    local caches='none writeback writethrough directsync unsafe'
    local formats='qed raw qcow2 vmdk vdi vhdx vpc'
    local i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -T | --trace) [[ $command ]] || ((i++)) ;;
            -*) ;;
            *)
                command=${COMP_WORDS[i]}
                break
                ;;
        esac
    done

    if [[ ! $command ]]; then
        COMPREPLY=($(compgen -W "--help --version --debug --trace
            create info check salvage resize rebase commit compact map dump compare convert dd measure bench
            snapshot amend bitmap" -- "$word"))
        return
    fi
    case $previous in
        -f | --format | -F | -O)
            COMPREPLY=($(compgen -W "$formats" -- "$word"))
            return
            ;;
        -t | -T)
            COMPREPLY=($(compgen -W "$caches" -- "$word"))
            return
            ;;
        --output)
            COMPREPLY=($(compgen -W 'human json' -- "$word"))
            return
            ;;
        -r)
            if [[ $command == check ]]; then
                COMPREPLY=($(compgen -W 'leaks all' -- "$word"))
                return
            fi
            ;;
        -o)
            compopt -o nospace
            COMPREPLY=($(compgen -W 'cluster_size= table_size= size= backing_file= backing_fmt= help' -- "$word"))
            return
            ;;
    esac
    if [[ $word == -* ]]; then
        local options='--help --debug --image-opts --object -f'
        case $command in
            create) options+=' -q -b -F -u -o' ;;
            info) options+=' -U --output= --backing-chain --verbose' ;;
            check) options+=' -q -p -U -T -r --dry-run --verbose --output=' ;;
            resize) options+=' -q --shrink --preallocation=' ;;
            rebase) options+=' -q -p -U -t -T -b -F -u' ;;
            commit) options+=' -q -p -t -d -b -r' ;;
            compact) options+=' -q -p -t --zeros' ;;
            map) options+=' -U --output= --start-offset= --max-length=' ;;
            dump) options+=' -U --output= --header --l1 --l2' ;;
            compare) options+=' -F -p -q -s -T -U' ;;
            convert)
                options+=' -O -o -B -F -n -p -q -S -t -T -U -r --target-is-zero --target-image-opts --salvage'
                ;;
            measure) options+=' -O -o -U --size --output=' ;;
            dd) options+=' -O -U' ;;
            bench) options+=' -q -t -U -c -d -o -s -S -w --pattern= --flush-interval= --no-drain -i -n' ;;
            snapshot) options+=' -q -U -l -a -c -d' ;;
            amend) options+=' -q -p -t -o' ;;
            bitmap) options+=' --add --remove --clear --enable --disable --merge' ;;
            salvage) options='--help --debug -q -p -U --output= --cluster-size= --table-size= --size=' ;;
        esac
        compopt -o nospace
        local reply
        COMPREPLY=($(compgen -W "$options" -- "$word"))
        for i in "${!COMPREPLY[@]}"; do
            reply=${COMPREPLY[i]}
            [[ $reply == *= ]] || COMPREPLY[i]="$reply "
        done
        return
    fi
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -f -- "$word")
}

complete -F _qed qed
