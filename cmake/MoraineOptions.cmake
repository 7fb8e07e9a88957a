# Switches and the flags every target shares. AUTO = use it when this machine can run it.
include(CMakeDependentOption)
include(GNUInstallDirs)

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})

foreach(part CUDA NCCL MPI)
  set(MORAINE_WITH_${part} AUTO CACHE STRING "Build with ${part}: AUTO, ON or OFF")
  set_property(CACHE MORAINE_WITH_${part} PROPERTY STRINGS AUTO ON OFF)
  if(NOT MORAINE_WITH_${part} MATCHES "^(AUTO|ON|OFF)$")
    message(FATAL_ERROR "MORAINE_WITH_${part} must be AUTO, ON or OFF, not '${MORAINE_WITH_${part}}'")
  endif()
endforeach()
option(MORAINE_BUILD_TESTS "Build the tests" ON)
option(MORAINE_BUILD_BENCH "Build the benchmarks" ON)
option(MORAINE_WERROR "Treat warnings as errors" OFF)
set(MORAINE_SANITIZE "" CACHE STRING "address, undefined or thread")

# CUDA is only worth its build time where a driver can run it; ON forces it (no GPU is needed to compile and link).
if(MORAINE_WITH_CUDA STREQUAL "AUTO")
  if(EXISTS /dev/nvidiactl)
    set(MORAINE_WITH_CUDA ON)
  else()
    set(MORAINE_WITH_CUDA OFF)
  endif()
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

add_library(moraine_options INTERFACE)
add_library(moraine::options ALIAS moraine_options)
target_include_directories(moraine_options INTERFACE ${CMAKE_SOURCE_DIR})
# -Wno-restrict: g++ 12 sees overlapping copies inside std::string's operator+ (GCC bug 105651).
# -ffp-contract=off: results must not depend on which multiply-adds the compiler happened to fuse.
target_compile_options(moraine_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Wno-restrict -ffp-contract=off>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${MORAINE_WERROR}>>:-Werror>)
if(MORAINE_SANITIZE)
  target_compile_options(moraine_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${MORAINE_SANITIZE} -fno-omit-frame-pointer>)
  target_link_options(moraine_options INTERFACE -fsanitize=${MORAINE_SANITIZE})
endif()

# moraine_add_library(<folder> SOURCES ... PUBLIC ... PRIVATE ...): target moraine_<folder>, alias moraine::<folder>.
function(moraine_add_library folder)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(moraine_${folder} STATIC ${ARG_SOURCES})
  add_library(moraine::${folder} ALIAS moraine_${folder})
  target_link_libraries(moraine_${folder} PUBLIC moraine::options ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
endfunction()
