# Prints what bash offers when the Tab key is pressed after the last word: complete.bash SCRIPT WORD...
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_fastgen
printf '%s\n' "${COMPREPLY[@]}"
