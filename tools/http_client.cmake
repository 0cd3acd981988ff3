# The command line's HTTP call, and the certificates it makes.
# -O1: they wait for sockets; -O3 takes three times as long to compile and nothing runs faster.
set_source_files_properties(http_client_beast.cpp PROPERTIES COMPILE_OPTIONS -O1)
add_library(sc_http_client STATIC http_client_beast.cpp)
target_link_libraries(sc_http_client
  PUBLIC sc_config sc_tls
  PRIVATE sc_beast OpenSSL::SSL OpenSSL::Crypto Threads::Threads)

add_library(sc_certs STATIC certs.cpp)
target_link_libraries(sc_certs PUBLIC sc_config sc_tls PRIVATE OpenSSL::Crypto)

add_executable(test_certs ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
                          ${CMAKE_SOURCE_DIR}/tests/certs_test.cpp)
target_link_libraries(test_certs PRIVATE sc_certs doctest::doctest)
add_test(NAME certs COMMAND test_certs)
