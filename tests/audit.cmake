# What watches over the bits: faults on purpose, the vote's hashes, windows that are computed again.
add_executable(test_worker_audit doctest_main.cpp fault_injection_test.cpp)
target_link_libraries(test_worker_audit PRIVATE test_training_run)
add_test(NAME worker_audit COMMAND test_worker_audit)
