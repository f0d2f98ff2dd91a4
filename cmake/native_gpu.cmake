# The architectures to compile for this machine's GPUs; empty where there is none that moeops supports.
# Run as a script, `cmake -P cmake/native_gpu.cmake` prints them.

# nvidia-smi needs a driver and a GPU, which nvcc alone does not tell of.
function(moeops_native_architectures result)
  find_program(MOEOPS_NVIDIA_SMI nvidia-smi)
  set(architectures "")
  if(MOEOPS_NVIDIA_SMI)
    execute_process(
      COMMAND "${MOEOPS_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities RESULT_VARIABLE status ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(status EQUAL 0)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" capabilities "${capabilities}")
      foreach(capability IN LISTS capabilities)
        string(REPLACE "." "" number "${capability}")
        if(number EQUAL 90)
          list(APPEND architectures 90a-real)  # Hopper's own instructions are in 90a alone
        elseif(number GREATER_EQUAL 80)
          list(APPEND architectures ${number}-real)
        else()
          message(STATUS "moeops: a GPU of compute capability ${capability} is not supported, 8.0 is needed")
        endif()
      endforeach()
      list(REMOVE_DUPLICATES architectures)
    endif()
  endif()
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  moeops_native_architectures(architectures)
  message(NOTICE "${architectures}")
endif()
