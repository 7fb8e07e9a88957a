# moraine::torch: LibTorch out of the PyPI wheel, without find_package(Torch) (it costs 7-13 s per configure and fails
# with nvcc 13 under CMake 3.25). Looked for in MORAINE_TORCH_DIR, then in the repository's .venv, then in python3's own packages.
set(MORAINE_TORCH_DIR "" CACHE PATH "The 'torch' directory of an installed PyPI torch wheel")
set(_torch_candidates ${MORAINE_TORCH_DIR})
file(GLOB _venv_torch ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/torch)
list(APPEND _torch_candidates ${_venv_torch})
if(NOT _torch_candidates)
  execute_process(COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                  OUTPUT_VARIABLE _python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  list(APPEND _torch_candidates ${_python_torch})
endif()
foreach(dir ${_torch_candidates})
  if(EXISTS ${dir}/lib/libtorch_cpu.so)
    set(_torch ${dir})
    break()
  endif()
endforeach()
if(NOT _torch)
  message(FATAL_ERROR "LibTorch not found. Run scripts/setup, or pass -DMORAINE_TORCH_DIR=<site-packages>/torch")
endif()
file(READ ${_torch}/version.py _torch_version)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${_torch_version}")
set(MORAINE_TORCH_VERSION ${CMAKE_MATCH_1})
message(STATUS "LibTorch ${MORAINE_TORCH_VERSION}: ${_torch}")

add_library(moraine_torch INTERFACE)
add_library(moraine::torch ALIAS moraine_torch)
# -idirafter: torch ships its own fmt/, which must not shadow the system's.
target_compile_options(moraine_torch INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-idirafter ${_torch}/include>"
  "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-idirafter ${_torch}/include/torch/csrc/api/include>")
target_compile_definitions(moraine_torch INTERFACE MORAINE_TORCH_VERSION="${MORAINE_TORCH_VERSION}")
target_link_libraries(moraine_torch INTERFACE ${_torch}/lib/libtorch_cpu.so ${_torch}/lib/libc10.so)
target_link_options(moraine_torch INTERFACE -Wl,-rpath,${_torch}/lib -Wl,--allow-shlib-undefined)
set(MORAINE_TORCH_ROOT ${_torch})
