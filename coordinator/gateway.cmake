# The coordinator's port, and the parts that every TLS or Beast file of the house shares.
# -O1: they wait for sockets; -O3 takes three times as long to compile and nothing runs faster.
set_source_files_properties(gateway_beast.cpp beast_impl.cpp
  ${CMAKE_SOURCE_DIR}/config/byte_stream_beast.cpp PROPERTIES COMPILE_OPTIONS -O1)
add_library(sc_tls STATIC ${CMAKE_SOURCE_DIR}/config/tls_openssl.cpp)
target_link_libraries(sc_tls PUBLIC sc_config PRIVATE OpenSSL::SSL OpenSSL::Crypto)

# Beast's body, compiled once. Only three .cpp files see Beast: this room's gateway, worker's control
# client and tools' HTTP client (one such file takes 10-20 s).
add_library(sc_beast STATIC beast_impl.cpp ${CMAKE_SOURCE_DIR}/config/byte_stream_beast.cpp)
target_compile_definitions(sc_beast PUBLIC BOOST_BEAST_SEPARATE_COMPILATION)
target_link_libraries(sc_beast PUBLIC sc_asio sc_tls Boost::headers house_rules)

add_library(sc_gateway STATIC gateway_beast.cpp gateway_rules.cpp)
target_link_libraries(sc_gateway
  PUBLIC sc_config sc_tls
  PRIVATE sc_log sc_beast nlohmann_json::nlohmann_json OpenSSL::SSL OpenSSL::Crypto Threads::Threads)

add_executable(test_gateway ${CMAKE_SOURCE_DIR}/tests/doctest_main.cpp
                            ${CMAKE_SOURCE_DIR}/tests/gateway_test.cpp)
target_link_libraries(test_gateway PRIVATE sc_gateway sc_control_client sc_http_client sc_certs sc_log
                                           doctest::doctest Threads::Threads)
add_test(NAME gateway COMMAND test_gateway)

add_executable(fuzz_http ${CMAKE_SOURCE_DIR}/tests/fuzz/http_fuzz.cpp)
target_link_libraries(fuzz_http PRIVATE sc_gateway sc_log)
add_test(NAME fuzz_http COMMAND fuzz_http)
