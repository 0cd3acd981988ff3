# What watches over the bits: faults on purpose, the vote's hashes, windows that are computed again.
add_executable(test_worker_audit doctest_main.cpp fault_injection_test.cpp vote_test.cpp window_run_test.cpp)
target_link_libraries(test_worker_audit PRIVATE test_training_run sc_storage)
add_test(NAME worker_audit COMMAND test_worker_audit)

if(TARGET stagecoach)
  foreach(group vote replay patrol)
    add_test(NAME audit_${group} COMMAND python3 ${CMAKE_CURRENT_SOURCE_DIR}/audit_test.py
                                         $<TARGET_FILE:stagecoach> ${group})
    set_tests_properties(audit_${group} PROPERTIES TIMEOUT 900 RUN_SERIAL TRUE)
  endforeach()
endif()
