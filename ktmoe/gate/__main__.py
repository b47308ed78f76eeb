"""`python -m ktmoe.gate SUBJECT LEVEL`: the contract, in a process of its own."""

import json
import sys

from ktmoe.gate.gate import run_contract


about = json.loads(sys.argv[1])
print(json.dumps({"about": about, "problems": run_contract(about, sys.argv[2])}))
