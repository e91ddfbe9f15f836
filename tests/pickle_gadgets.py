"""Names of code that pickles have been known to call, each in a file that asks for it."""

from __future__ import annotations

from typing import Any

from tests.pickle_assembler import call, network, pickled, storage, tensor

_NAMES = """
os.system posix.system nt.system os.popen os.execv os.remove os.putenv subprocess.Popen
subprocess.call subprocess.check_output builtins.eval builtins.exec builtins.compile
builtins.getattr builtins.setattr builtins.__import__ builtins.open builtins.print builtins.map
__builtin__.eval __builtin__.file importlib.import_module runpy.run_path runpy._run_code
operator.attrgetter operator.methodcaller functools.partial functools.reduce types.FunctionType
types.CodeType code.interact codeop.compile_command pickle.loads _pickle.loads marshal.loads
copyreg._reconstructor copyreg.__newobj__ ctypes.CDLL socket.create_connection webbrowser.open
urllib.request.urlopen shutil.rmtree pathlib.Path pathlib.PosixPath tempfile.mktemp pty.spawn
pdb.run bdb.Bdb profile.run cProfile.run timeit.timeit doctest.debug_script trace.Trace
pip.main pip._internal.main ensurepip._run_pip venv.create multiprocessing.Process
asyncio.subprocess.create_subprocess_shell concurrent.futures.ThreadPoolExecutor
logging.config.listen site.main distutils.spawn.spawn torch.load torch.hub.load torch.jit.load
torch.ops.load_library torch.utils.cpp_extension.load torch.save torch.serialization.load
torch._utils._rebuild_device_tensor_from_numpy torch._utils._rebuild_wrapper_subclass
torch._tensor._rebuild_from_type_v2 torch.utils.collect_env.run
torch._dynamo.config.load_config torch.nn.Module torch.package.PackageImporter numpy.load
numpy.fromfile numpy.memmap numpy.testing._private.utils.runstring numpy.f2py.compile
numpy.core.multiarray.fromfile joblib.load yaml.unsafe_load dill.loads cloudpickle.loads
dnnlib.util.call_func_by_name dnnlib.util.construct_class_by_name dnnlib.util.open_url
torch_utils.persistence.import_hook torch_utils.persistence._src_to_module
torch_utils.misc.copy_params_and_buffers fewstep.safe_pickle.snapshot.read_snapshot __main__.main
"""
GADGETS = tuple(_NAMES.split())


def gadgets() -> dict[str, bytes]:
    """By name, in both spellings, at the top, in a network, and in a storage."""
    found = {}
    for index, path in enumerate(GADGETS):
        home, _, attribute = path.rpartition(".")
        for modern in (True, False):
            made = call(home, attribute, "touch canary", modern=modern)
            tree: Any = {"ema": made}
            if index % 3 == 1:  # hidden in a network's state
                tree = {"ema": network({"w": made})}
            if index % 3 == 2:  # hidden in a storage
                tree = {"ema": network({"w": tensor(storage(object=pickled(made, 2)))})}
            found[f"{path} {'STACK_' if modern else ''}GLOBAL"] = pickled(tree)
    return found
