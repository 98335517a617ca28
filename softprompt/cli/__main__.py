"""python -m softprompt.cli"""

from softprompt.cli import main

main()
